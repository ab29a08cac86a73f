"""What the API shows of the rows, as values for JSON."""


def payment_request_data(payment_request):
    """A payment request with its approvals. The amount is a text, since many clients read numbers as floats."""
    return {
        "id": str(payment_request.id),
        "batchId": str(payment_request.batch_id),
        "number": payment_request.number,
        "amount": str(payment_request.amount),
        "currency": payment_request.currency,
        "beneficiaryName": payment_request.beneficiary_name,
        "beneficiaryAccount": payment_request.beneficiary_account,
        "purpose": payment_request.purpose,
        "status": payment_request.status,
        "createdBy": payment_request.created_by,
        "createdAt": payment_request.created_at.isoformat(),
        "paidBy": payment_request.paid_by,
        "paidAt": payment_request.paid_at and payment_request.paid_at.isoformat(),
        "approvals": [approval_data(record) for record in payment_request.approvals.all()],
    }


def approval_data(record):
    """Who decided, and how."""
    return {
        "decision": record.decision,
        "approver": record.approver,
        "comment": record.comment,
        "createdAt": record.created_at.isoformat(),
    }
