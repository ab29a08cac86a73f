"""
What the bodies of requests must be.

They are read here for the work. The fingerprint is not made of what is read, but of the text as it came.
"""

import json
import re
from decimal import Decimal

from django import forms

from .errors import DomainError

#: At most 16 digits and 2 decimals. Decimal itself takes more: 1e3, 1_000, NaN, digits of other scripts.
_AMOUNT = re.compile(r"[0-9]{1,16}(\.[0-9]{1,2})?")


class TextField(forms.CharField):
    """A text of JSON, and no number or list that could be written as one."""

    def to_python(self, value):
        if value is not None and not isinstance(value, str):
            raise forms.ValidationError("This must be a text.")
        return super().to_python(value)


class AmountField(forms.Field):
    """An amount above zero, as a text or a number of JSON."""

    def to_python(self, value):
        if value in self.empty_values:
            return None
        if not _AMOUNT.fullmatch(str(value)) or Decimal(str(value)) == 0:
            raise forms.ValidationError("This must be an amount such as 1000.00.")
        return Decimal(str(value)).quantize(Decimal("0.01"))


class PaymentRequestForm(forms.Form):
    """The body of ``add_request``."""

    amount = AmountField()
    currency = forms.RegexField(r"^[A-Z]{3}\Z", error_messages={"invalid": "This must be a currency such as USD."})
    beneficiaryName = TextField(max_length=200)
    beneficiaryAccount = TextField(max_length=100)
    purpose = TextField(max_length=500)


class CommentForm(forms.Form):
    """The body of ``approve_request`` and ``reject_request``."""

    comment = TextField(max_length=1000, required=False)


def read(form, request):
    """
    The values of the body of a request, by the names of a form.

    Raises DomainError with 400 if they are not what the form wants.
    """
    try:
        # a number must not become a float on the way
        body = json.loads(request.body or "{}", parse_float=Decimal)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise DomainError(400, "VALIDATION_ERROR", "The body must be a JSON object")
    filled = form(body)
    if not filled.is_valid():
        problems = {name: [str(message) for message in messages] for name, messages in filled.errors.items()}
        raise DomainError(400, "VALIDATION_ERROR", "The request is not valid", **problems)
    return filled.cleaned_data
