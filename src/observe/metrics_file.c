/*-------------------------------------------------------------------------
 *
 * metrics_file.c
 *	  Keeping counters over a restart of the server.
 *
 * They are saved to a file when the server is shut down, and read back when it
 * starts.  The file is removed before it is read, so that after a crash nothing
 * is counted twice; what was not flushed is lost.  It ends with a checksum of all
 * that is before, and a file that is not as it was written is not used at all.
 *
 *-------------------------------------------------------------------------
 */
#include "base.h"

#include <sys/stat.h>
#include <unistd.h>

#include "catalog/pg_control.h"
#include "common/controldata_utils.h"
#include "miscadmin.h"
#include "observe/metrics_file.h"
#include "pgstat.h"
#include "port/pg_crc32c.h"
#include "storage/fd.h"
#include "storage/ipc.h"

#define FILE_NAME	PGSTAT_STAT_PERMANENT_DIRECTORY "/idempotency.stat"
#define FILE_MAGIC	0x1de30003

/* The beginning of the file; the entries follow, and then the checksum */
typedef struct FileHeader
{
	uint32		magic;
	int32		count;			/* of entries */
	TimestampTz since;
} FileHeader;

static void save(int code, Datum arg);
static bool is_shut_down(void);
static bool write_file(FILE *file, const SavedMetrics *saved, int count,
					   TimestampTz since);
static bool write_part(FILE *file, const void *part, size_t size,
					   pg_crc32c *crc);
static bool read_file(FILE *file);
static bool read_part(FILE *file, void *part, size_t size, pg_crc32c *crc);

static GetSavedMetrics get_saved;
static PutSavedMetrics put_saved;

/*
 * Have counters saved when the server is shut down; by whom they are got, and
 * given back.
 */
void
MetricsFileInit(GetSavedMetrics get, PutSavedMetrics put)
{
	get_saved = get;
	put_saved = put;

	/* in the postmaster only, which is the last to go */
	if (!IsUnderPostmaster)
		on_shmem_exit(save, (Datum) 0);
}

/*
 * Remove the file with what was saved, and read it.
 */
void
MetricsFileLoad(void)
{
	FILE	   *file = AllocateFile(FILE_NAME, PG_BINARY_R);

	if (file == NULL)
	{
		if (errno != ENOENT)
			ereport(LOG,
					(errcode_for_file_access(),
					 errmsg("could not read file \"%s\": %m", FILE_NAME)));
		return;
	}

	if (durable_unlink(FILE_NAME, LOG) == 0 && !read_file(file))
		ereport(LOG,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("ignoring invalid data in file \"%s\"", FILE_NAME)));
	FreeFile(file);
}

/*
 * Exit callback of the postmaster: save the counters when the server is shut
 * down in an orderly way.
 */
static void
save(int code, Datum arg)
{
	FILE	   *file;
	SavedMetrics *saved;
	int			count;
	TimestampTz since;

	if (!is_shut_down())
		return;

	saved = get_saved(&count, &since);
	file = AllocateFile(FILE_NAME ".tmp", PG_BINARY_W);
	if (file == NULL || !write_file(file, saved, count, since) ||
		FreeFile(file) != 0)
	{
		ereport(LOG,
				(errcode_for_file_access(),
				 errmsg("could not write file \"%s\": %m", FILE_NAME ".tmp")));
		if (file != NULL)
			unlink(FILE_NAME ".tmp");
		return;
	}
	(void) durable_rename(FILE_NAME ".tmp", FILE_NAME, LOG);
}

/*
 * Whether nothing was committed that is not on disk.
 *
 * The exit code of the postmaster does not tell: after a stop in immediate mode
 * it is as if all were well, and a start that failed for an error in a
 * configuration file has read what was saved, and must not lose it.
 */
static bool
is_shut_down(void)
{
	bool		crc_ok;
	ControlFileData *control = get_controlfile(DataDir, &crc_ok);

	return crc_ok && (control->state == DB_SHUTDOWNED ||
					  control->state == DB_SHUTDOWNED_IN_RECOVERY);
}

/*
 * Write the file.  Returns false if that failed, with errno set.
 */
static bool
write_file(FILE *file, const SavedMetrics *saved, int count, TimestampTz since)
{
	FileHeader	header = {
		.magic = FILE_MAGIC,
		.count = count,
		.since = since,
	};
	pg_crc32c	crc;

	INIT_CRC32C(crc);
	if (!write_part(file, &header, sizeof(header), &crc) ||
		(count > 0 &&
		 !write_part(file, saved, count * sizeof(SavedMetrics), &crc)))
		return false;
	FIN_CRC32C(crc);
	return fwrite(&crc, sizeof(crc), 1, file) == 1;
}

/*
 * Write a part of the file, and have the checksum include it.
 */
static bool
write_part(FILE *file, const void *part, size_t size, pg_crc32c *crc)
{
	COMP_CRC32C(*crc, part, size);
	return fwrite(part, size, 1, file) == 1;
}

/*
 * Read the file, and give back what is in it.  Returns false if it is not one
 * that we wrote, and has not changed anything then.
 */
static bool
read_file(FILE *file)
{
	FileHeader	header;
	SavedMetrics *saved;
	pg_crc32c	crc;
	pg_crc32c	written;
	struct stat status;
	Size		size;
	bool		valid;

	INIT_CRC32C(crc);
	if (!read_part(file, &header, sizeof(header), &crc) ||
		header.magic != FILE_MAGIC || header.count < 0)
		return false;

	/* until the checksum has been seen, the count may be anything */
	size = (Size) header.count * sizeof(SavedMetrics);
	if (fstat(fileno(file), &status) != 0 ||
		status.st_size != (off_t) (sizeof(header) + size + sizeof(written)))
		return false;

	saved = palloc_extended(Max(size, 1), MCXT_ALLOC_HUGE);
	valid = (size == 0 || read_part(file, saved, size, &crc)) &&
		fread(&written, sizeof(written), 1, file) == 1;
	FIN_CRC32C(crc);
	valid = valid && EQ_CRC32C(crc, written);

	if (valid)
		put_saved(saved, header.count, header.since);
	pfree(saved);

	return valid;
}

/*
 * Read a part of the file, and have the checksum include it.
 */
static bool
read_part(FILE *file, void *part, size_t size, pg_crc32c *crc)
{
	if (fread(part, size, 1, file) != 1)
		return false;
	COMP_CRC32C(*crc, part, size);
	return true;
}
