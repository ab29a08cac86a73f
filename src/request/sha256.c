/*-------------------------------------------------------------------------
 *
 * sha256.c
 *	  SHA-256, as cheap as it can be had.
 *
 * Each request that is begun takes one or two hashes: the fingerprint and the
 * tag of its lock.  The server's own interface (common/cryptohash.h) goes to
 * OpenSSL where the server was built with that, and has it look the algorithm
 * up by its name for each hash, which takes five times the instructions of
 * hashing a short message.  OpenSSL's answer is to fetch the algorithm once and
 * keep it ("Performance" in crypto(7)).  So we do that, with the library that
 * the server is linked to anyway.  Without OpenSSL the server brings code of
 * its own, and there is nothing to be saved.
 *
 * There is one context in a process, and one hash at a time.  What an error
 * left unfinished is forgotten by the next start.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include "request/sha256.h"

#ifdef USE_OPENSSL

#include <openssl/evp.h>

/* the context, and the algorithm; null before the first hash */
static EVP_MD_CTX *context = NULL;
static const EVP_MD *algorithm = NULL;

static void open_context(void);
static void hash_failed(void);

/*
 * Start to hash a message.
 */
void
Sha256Start(void)
{
	if (context == NULL)
		open_context();
	if (EVP_DigestInit_ex(context, algorithm, NULL) != 1)
		hash_failed();
}

/*
 * Add len bytes to the message.
 */
void
Sha256Add(const void *data, size_t len)
{
	if (EVP_DigestUpdate(context, data, len) != 1)
		hash_failed();
}

/*
 * Write the hash of the message, PG_SHA256_DIGEST_LENGTH bytes.
 */
void
Sha256Finish(uint8 *digest)
{
	if (EVP_DigestFinal_ex(context, digest, NULL) != 1)
		hash_failed();
}

/*
 * Make the context, for as long as the process lives.
 */
static void
open_context(void)
{
#if OPENSSL_VERSION_NUMBER >= 0x30000000L
	if (algorithm == NULL)
		algorithm = EVP_MD_fetch(NULL, "SHA256", NULL);
#else
	algorithm = EVP_sha256();
#endif
	if (algorithm != NULL)
		context = EVP_MD_CTX_new();
	if (context == NULL)
		hash_failed();
}

static void
hash_failed(void)
{
	elog(ERROR, "could not compute SHA-256");
}

#else							/* not USE_OPENSSL */

#include "common/cryptohash.h"
#include "utils/memutils.h"

static pg_cryptohash_ctx *context = NULL;

static void hash_failed(void);

/*
 * Start to hash a message.
 */
void
Sha256Start(void)
{
	if (context == NULL)
	{
		MemoryContext oldcontext = MemoryContextSwitchTo(TopMemoryContext);

		context = pg_cryptohash_create(PG_SHA256);
		MemoryContextSwitchTo(oldcontext);
	}
	if (pg_cryptohash_init(context) < 0)
		hash_failed();
}

/*
 * Add len bytes to the message.
 */
void
Sha256Add(const void *data, size_t len)
{
	if (pg_cryptohash_update(context, data, len) < 0)
		hash_failed();
}

/*
 * Write the hash of the message, PG_SHA256_DIGEST_LENGTH bytes.
 */
void
Sha256Finish(uint8 *digest)
{
	if (pg_cryptohash_final(context, digest, PG_SHA256_DIGEST_LENGTH) < 0)
		hash_failed();
}

static void
hash_failed(void)
{
	elog(ERROR, "could not compute SHA-256: %s", pg_cryptohash_error(context));
}

#endif							/* USE_OPENSSL */
