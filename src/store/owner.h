/*-------------------------------------------------------------------------
 *
 * owner.h
 *	  Acting with the rights of the owner of a table.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_OWNER_H
#define IDEMPOTENCY_OWNER_H

#include "postgres.h"

/* What to go back to */
typedef struct Owner
{
	Oid			user;
	int			sec_context;
	int			nest_level;
} Owner;

extern void OwnerBecome(Owner *owner, Oid table);
extern void OwnerLeave(const Owner *owner);

#endif							/* IDEMPOTENCY_OWNER_H */
