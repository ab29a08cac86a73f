# idempotency: PostgreSQL extension that makes retried requests safe
#
# make && make install && make installcheck
#
# installcheck starts throw-away servers of its own, which cannot run as root.

EXTENSION = idempotency
MODULE_big = idempotency
DATA = sql/idempotency--1.0.sql
OBJS = \
	src/begin.o \
	src/call.o \
	src/checkpoint.o \
	src/claim.o \
	src/event.o \
	src/event_key.o \
	src/fingerprint.o \
	src/finish.o \
	src/first_seen.o \
	src/flush.o \
	src/forget.o \
	src/guard.o \
	src/histogram.o \
	src/idempotency.o \
	src/in_flight.o \
	src/keep.o \
	src/launcher.o \
	src/lease.o \
	src/log.o \
	src/metrics.o \
	src/owner.o \
	src/replay.o \
	src/request.o \
	src/result.o \
	src/run.o \
	src/scan.o \
	src/schedule.o \
	src/scope.o \
	src/sha256.o \
	src/status.o \
	src/store.o \
	src/sweep.o \
	src/wake.o \
	src/watch.o \
	src/worker.o \
	src/worker_status.o

PG_CFLAGS = -Wall -Wextra -Wno-unused-parameter

REGRESS = $(sort $(basename $(notdir $(wildcard test/sql/*.sql))))
REGRESS_OPTS = --inputdir=test --temp-instance=tmp_check \
	--temp-config=test/preload.conf --no-locale --encoding=UTF8
ISOLATION = $(sort $(basename $(notdir $(wildcard test/specs/*.spec))))
ISOLATION_OPTS = --inputdir=test --outputdir=. --temp-instance=tmp_check_iso \
	--temp-config=test/preload.conf --load-extension=idempotency
TAP_TESTS = 1
PROVE_TESTS ?= test/t/*.pl

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

$(OBJS): $(wildcard src/*.h)
