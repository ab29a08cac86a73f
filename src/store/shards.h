/*-------------------------------------------------------------------------
 *
 * shards.h
 *	  Where the records of a tenant are, on a cluster.
 *
 *-------------------------------------------------------------------------
 */
#ifndef IDEMPOTENCY_SHARDS_H
#define IDEMPOTENCY_SHARDS_H

#include "postgres.h"

#include "utils/relcache.h"

/* What a cluster has made of the table of records, and what is wrong with it */
typedef struct ShardsStatus
{
	bool		distributed;	/* by tenant, as it should be */
	const char *problem;		/* why calls are refused, null if they are not */
	int			nodes;			/* active nodes of the cluster, 0 without one */
} ShardsStatus;

extern bool ShardsLoad(Relation table);
extern Oid	ShardsFind(Datum tenant);
extern int	ShardsFindNode(Datum tenant);
extern Oid	ShardsNextHere(Oid from);
extern ShardsStatus ShardsGetStatus(Relation table);

#endif							/* IDEMPOTENCY_SHARDS_H */
