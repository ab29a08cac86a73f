# idempotency: PostgreSQL extension that makes retried requests safe
#
# make && make install && make installcheck
#
# installcheck starts throw-away servers of its own, which cannot run as root.

EXTENSION = idempotency
MODULE_big = idempotency
DATA = sql/idempotency--1.0.sql
OBJS = \
	src/background/created.o \
	src/background/databases.o \
	src/background/launcher.o \
	src/background/schedule.o \
	src/background/sweep.o \
	src/background/watch.o \
	src/background/worker.o \
	src/background/worker_shared.o \
	src/background/worker_status.o \
	src/call/at_owner.o \
	src/call/begin.o \
	src/call/checkpoint.o \
	src/call/event_key.o \
	src/call/finish.o \
	src/call/first_seen.o \
	src/call/forget.o \
	src/call/forward.o \
	src/call/handler.o \
	src/call/keep.o \
	src/call/replay.o \
	src/call/request.o \
	src/call/result.o \
	src/call/run.o \
	src/call/scan.o \
	src/claim/claim.o \
	src/claim/guard.o \
	src/claim/in_flight.o \
	src/claim/lease.o \
	src/claim/lock.o \
	src/claim/wake.o \
	src/idempotency.o \
	src/observe/event.o \
	src/observe/event_class.o \
	src/observe/flush.o \
	src/observe/histogram.o \
	src/observe/log.o \
	src/observe/metrics.o \
	src/observe/metrics_file.o \
	src/observe/records.o \
	src/request/arguments.o \
	src/request/fingerprint.o \
	src/request/scope.o \
	src/request/sha256.o \
	src/request/status.o \
	src/settings.o \
	src/shared_memory.o \
	src/store/catalog.o \
	src/store/direct.o \
	src/store/distribute.o \
	src/store/find.o \
	src/store/owner.o \
	src/store/record.o \
	src/store/sharded.o \
	src/store/shards.o \
	src/store/store.o \
	src/transaction.o

PG_CFLAGS = -Wall -Wextra -Wno-unused-parameter
PG_CPPFLAGS = -I$(srcdir)/src

REGRESS = $(sort $(basename $(notdir $(wildcard test/sql/*.sql))))
REGRESS_OPTS = --inputdir=test --temp-instance=tmp_check \
	--temp-config=test/preload.conf --no-locale --encoding=UTF8
ISOLATION = $(sort $(basename $(notdir $(wildcard test/specs/*.spec))))
ISOLATION_OPTS = --inputdir=test --outputdir=. --temp-instance=tmp_check_iso \
	--temp-config=test/preload.conf --load-extension=idempotency
TAP_TESTS = 1
PROVE_TESTS ?= test/t/*.pl

# What the others share comes first, also where only some of them are chosen; with
# none of them (REGRESS= or ISOLATION=) that runner is left out.
ifneq ($(strip $(REGRESS)),)
override REGRESS := setup $(filter-out setup, $(REGRESS))
endif
ifneq ($(strip $(ISOLATION)),)
override ISOLATION := iso_setup $(filter-out iso_setup, $(ISOLATION))
endif

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

# What the server is linked to for its hashes, if anything
SHLIB_LINK += $(filter -lcrypto, $(LIBS))

# Before PostgreSQL 16 all symbols of a library are visible to others; make sure
# that ours are taken for ourselves.
ifeq ($(PORTNAME), linux)
SHLIB_LINK += -Wl,-Bsymbolic
endif

$(OBJS): $(wildcard $(srcdir)/src/*.h $(srcdir)/src/*/*.h)
