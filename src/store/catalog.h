/*-------------------------------------------------------------------------
 *
 * catalog.h
 *	  What the catalogs must say of the table of records.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_CATALOG_H
#define IDEMPOTENCY_CATALOG_H

#include "postgres.h"

#include "storage/lockdefs.h"
#include "utils/relcache.h"

/* Columns of idempotency_key */
#define Anum_idempotency_key_tenant				1
#define Anum_idempotency_key_action				2
#define Anum_idempotency_key_key				3
#define Anum_idempotency_key_actor				4
#define Anum_idempotency_key_state				5
#define Anum_idempotency_key_request_hash		6
#define Anum_idempotency_key_status_code		7
#define Anum_idempotency_key_headers			8
#define Anum_idempotency_key_response			9
#define Anum_idempotency_key_body				10
#define Anum_idempotency_key_claim				11
#define Anum_idempotency_key_attempt			12
#define Anum_idempotency_key_recovery_point		13
#define Anum_idempotency_key_recovery_state		14
#define Anum_idempotency_key_lease_expires_at	15
#define Anum_idempotency_key_created_at			16
#define Anum_idempotency_key_finished_at		17
#define Anum_idempotency_key_expires_at			18
#define Anum_idempotency_key_ttl				19
#define Natts_idempotency_key					19

/* Labels of idempotency_state */
typedef enum RecordState
{
	RECORD_PENDING,
	RECORD_COMPLETED,
	RECORD_ERRORED
} RecordState;

#define RECORD_STATES	3

/* What there is to know of the table by who opens it */
typedef struct CatalogTableInfo
{
	Oid			states[RECORD_STATES];	/* labels of its enum */
	bool		distributed;	/* the records are in shards of it */
} CatalogTableInfo;

extern void CatalogInit(void);
extern Oid	CatalogSchema(void);
extern Oid	CatalogTable(void);
extern Relation CatalogOpenTable(LOCKMODE lockmode, CatalogTableInfo *info);
extern Relation CatalogOpenShard(Oid shard, LOCKMODE lockmode);
extern bool CatalogIsDistributed(void);
extern Relation CatalogLookAtTable(LOCKMODE lockmode);
extern Oid	CatalogFindExpiryIndex(Relation rel);
extern bool CatalogIsScopeIndex(Relation index);
extern Oid	CatalogResultType(void);
extern Oid	CatalogResponseType(void);

#endif							/* IDEMPOTENCY_CATALOG_H */
