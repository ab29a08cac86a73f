"""
How gunicorn serves: HOST and PORT say where.

Two processes of sixteen threads each, so that a request that waits in the database keeps no other from
being served. Before they are started, the tables are made that are missing.
"""

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

_host = os.environ.get("HOST", "127.0.0.1")
_port = os.environ.get("PORT", "3000")

bind = f"[{_host}]:{_port}" if ":" in _host else f"{_host}:{_port}"
worker_class = "gthread"
workers = 2
threads = 16

# newer ones put a socket for commands into the home of the user, and leave it there
control_socket_disable = True


def on_starting(server):
    """Make the tables before anything is served."""
    import django

    django.setup()

    from payments.tables import create_tables

    create_tables()
