/*-------------------------------------------------------------------------
 *
 * handler.h
 *	  Handlers: work that is a function of the application.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_HANDLER_H
#define IDEMPOTENCY_HANDLER_H

#include "postgres.h"

#include "call/finish.h"

extern Oid	HandlerCheck(Oid handler);
extern void HandlerCall(Oid handler, Oid rettype, const NullableDatum *request,
						Answer *answer);

#endif							/* IDEMPOTENCY_HANDLER_H */
