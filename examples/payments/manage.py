#!/usr/bin/python3 -B
"""Django's command line: DATABASE_URL says with which database."""

import os
import sys

from django.core.management import execute_from_command_line

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
execute_from_command_line(sys.argv)
