/*-------------------------------------------------------------------------
 *
 * scope.h
 *	  The scope of a request: tenant, action, key and actor.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SCOPE_H
#define IDEMPOTENCY_SCOPE_H

#include "postgres.h"

#include "fmgr.h"
#include "storage/lock.h"

/* The parts of a scope, in the order of the columns of idempotency_key */
typedef enum ScopePart
{
	SCOPE_TENANT,
	SCOPE_ACTION,
	SCOPE_KEY,
	SCOPE_ACTOR
} ScopePart;

#define SCOPE_PARTS			4
#define SCOPE_PART_MAX		255 /* bytes in one part */

/*
 * The four parts one after the other, each behind a byte with its length.
 * Two scopes are equal if and only if their names are.
 */
typedef struct ScopeName
{
	uint16		len;			/* used bytes of data */
	unsigned char data[SCOPE_PARTS * (SCOPE_PART_MAX + 1)];
} ScopeName;

typedef struct Scope
{
	Datum		parts[SCOPE_PARTS]; /* text, as it goes into the record */
	LOCKTAG		locktag;		/* once ScopeSetLocktag() was called */
	ScopeName	name;
} Scope;

/* bytes to copy for a name that is no longer than needed */
#define SizeOfScopeName(name) (offsetof(ScopeName, data) + (name)->len)

extern void ScopeFromArguments(Scope *scope, FunctionCallInfo fcinfo,
							   int actor_argument);
extern bool ScopeFromParts(Scope *scope, const Datum *parts);
extern void ScopeCheckTenant(const text *tenant);
extern void ScopeCheckName(const char *what, const text *name);
extern void ScopeCheckKey(const text *key);
extern void ScopeSetLocktag(Scope *scope);
extern Datum ScopeNamePart(const ScopeName *name, ScopePart part);

/* The action, behind the byte with its length */
static inline const unsigned char *
ScopeNameAction(const ScopeName *name)
{
	StaticAssertDecl(SCOPE_ACTION == SCOPE_TENANT + 1, "order of parts");

	return name->data + 1 + name->data[0];
}

static inline bool
ScopeNameEquals(const ScopeName *a, const ScopeName *b)
{
	return a->len == b->len && memcmp(a->data, b->data, a->len) == 0;
}

#endif							/* IDEMPOTENCY_SCOPE_H */
