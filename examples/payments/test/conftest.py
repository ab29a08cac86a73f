"""One service on a database of its own, for all tests that do not harm it, and a new tenant for each test."""

import pytest
from database import Database
from service import Service
from tenants import Tenant


@pytest.fixture(scope="session")
def database():
    database = Database()
    yield database
    database.drop()


@pytest.fixture(scope="session")
def service(database):
    service = Service(database)
    yield service.ready()
    service.close()


@pytest.fixture
def tenant(service):
    return Tenant(service)
