"""The paths of the service."""

from django.urls import path
from payments import views
from payments.errors import error_response


def by_method(**views):
    """The view of a path, by the method of the request."""

    def view(request, **parameters):
        method = "GET" if request.method == "HEAD" else request.method
        if method in views:
            return views[method](request, **parameters)
        response = error_response(405, "METHOD_NOT_ALLOWED", f"{method} is not possible here")
        response["Allow"] = ", ".join(views)
        return response

    return view


urlpatterns = [
    path("health", by_method(GET=views.health)),
    path("api/v1/batches", by_method(POST=views.create_batch)),
    path("api/v1/batches/<uuid:batchId>/requests", by_method(GET=views.list_requests, POST=views.add_request)),
    path("api/v1/requests/<uuid:requestId>", by_method(GET=views.get_request)),
    path("api/v1/requests/<uuid:requestId>/approve", by_method(POST=views.approve_request)),
    path("api/v1/requests/<uuid:requestId>/reject", by_method(POST=views.reject_request)),
    path("api/v1/requests/<uuid:requestId>/mark-paid", by_method(POST=views.mark_paid)),
]

handler404 = "payments.errors.not_found"
handler500 = "payments.errors.internal_error"
