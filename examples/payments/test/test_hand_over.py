"""
What becomes of a view that does not hand the key over to its service.

For each view, a copy of the example in which the argument is taken out of that one view is started beside
the service, on the same database.
"""

import shutil

from service import EXAMPLE, Service
from tenants import OPERATIONS, each_operation, new_key

HAND_OVER = "        idempotency=request.idempotency,\n"


def without_hand_over(view, folder):
    """A copy of the example in which one view has lost its hand-over."""
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("test", "__pycache__"))
    views = folder / "payments" / "views.py"
    before, name, after = views.read_text().partition(f"def {view}(")
    body, end, others = after.partition("\n\n\n")
    assert body.count(HAND_OVER) == 1
    views.write_text(before + name + body.replace(HAND_OVER, "") + end + others)
    return folder


@each_operation
def test_view_that_does_not_hand_over_the_key_cannot_commit(operation, tenant, database, service, tmp_path):
    path = operation.path(tenant)
    others = [(other, other.path(tenant)) for other in OPERATIONS if other is not operation]
    key = new_key()
    before = database.everything()

    broken = Service(database, without_hand_over(operation.view, tmp_path / "payments"))
    try:
        broken.ready()
        for _ in range(2):
            answer = operation.send(tenant, path, key, broken)
            assert answer.summary == (500, "IDEMPOTENCY_UNFINISHED")
            assert answer.error["details"] == {}
        assert database.everything() == before
        assert f"payments.views.{operation.view} did not hand over request.idempotency" in broken.log
        # it was the server that did not let it pass (ID006)
        assert "transaction has a claim that was not finished" in broken.log

        for other, path_of_other in others:
            assert other.send(tenant, path_of_other, new_key(), broken).status == other.status
    finally:
        broken.close()

    # nothing of the key is in the way of the service when it is mended
    answer = operation.send(tenant, path, key)
    assert (answer.status, answer.replayed) == (operation.status, False)
