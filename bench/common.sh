#!/bin/bash
#
# bench/common.sh
#	  What the benchmarks share: a server of their own, and statistics.
#
# Each benchmark reads this file first.  It sets $bindir, the programs of the
# server that PG_CONFIG names, and $dir, a folder for everything that is written;
# at exit the server is stopped and the folder removed.
#
# A server needs an installed extension, and cannot be run by root.
#
# What else the machine does changes from one moment to the next.  So what is
# compared takes turns, and what is printed is the median of many, with the
# quartiles where the spread matters.  Results that are kept are CSV with a line
# of names, the first of which is always the server's version.

set -euo pipefail

bindir=$("${PG_CONFIG:-pg_config}" --bindir)
dir=$(mktemp -d)
export PGHOST=$dir PGDATABASE=postgres PGUSER=bench
trap 'stop; rm -rf "$dir"' EXIT

# make_server: initialize a server; its settings are read, and go after ours
make_server() {
	"$bindir/initdb" -D "$dir/data" -A trust -U bench --no-locale -E UTF8 >/dev/null
	cat >>"$dir/data/postgresql.conf" <<-END
		shared_preload_libraries = 'idempotency'
		listen_addresses = ''
		unix_socket_directories = '$dir'
		log_line_prefix = '%m %p '
		checkpoint_timeout = 1h
		max_wal_size = 16GB
		jit = off
		idempotency.worker = off
		$(cat)
	END
}

# start [COMMAND...]: start the server, under COMMAND if there is one
start() {
	"$@" "$bindir/postgres" -D "$dir/data" >>"$dir/log" 2>&1 &
	until "$bindir/psql" -Xqc '' 2>/dev/null; do sleep 0.2; done
}

stop() {
	[ ! -f "$dir/data/postmaster.pid" ] ||
		"$bindir/pg_ctl" -D "$dir/data" -m fast -w -t 300 stop >/dev/null
	wait						# valgrind writes when the server is gone
}

# start_counting: start the server with callgrind around each of its processes
start_counting() {
	start valgrind -q --tool=callgrind --trace-children=yes \
		--callgrind-out-file="$dir/callgrind.%p"
}

# counted PID: the instructions of a process that has ended, or is about to
counted() {
	until grep -qs '^totals:' "$dir/callgrind.$1"; do
		sleep 0.2
	done
	sed -n 's/^totals: //p' "$dir/callgrind.$1"
}

# last_client: the process that served the last pgbench; needs log_connections
last_client() {
	sed -n 's/^.* \([0-9]*\) LOG: .*application_name=pgbench.*/\1/p' "$dir/log" | tail -n 1
}

# figure WHAT NUMBER UNIT [COMPARED_WITH NUMBER]: print a line of results
figure() {
	echo "$(version),$1,$2,$3,${4-},${5:+$(quotient "$2" "$5")}"
}

# sql ARGUMENT...: the bare result of psql
sql() {
	"$bindir/psql" -XAtq -v ON_ERROR_STOP=1 "$@"
}

version() {
	"$bindir/postgres" --version | sed -E 's/[^0-9]*([0-9.]+).*/\1/'
}

# quartile NUMBER: of the numbers in the input; 2 is the median
quartile() {
	percentile $((25 * $1))
}

# percentile NUMBER: of the numbers in the input
percentile() {
	sort -g | awk -v part="$1" '{ value[NR] = $1 }
		END { at = int(NR * part / 100 + 0.999999); if (at < 1) at = 1; print value[at] }'
}

# quotient A B
quotient() {
	awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'
}

# turn CLIENTS SECONDS SCRIPT [OPTION...]: have pgbench run a script; print
# transactions a second, and the average and the percentiles 50, 95 and 99 of
# the latencies in milliseconds
turn() {
	rm -f "$dir"/latency.*
	"$bindir/pgbench" -n -M prepared -c "$1" -j 2 -T "$2" -l --log-prefix="$dir/latency" \
		-f "$3" "${@:4}" >"$dir/out" 2>&1 || { tail -n 20 "$dir/out" >&2; exit 1; }
	cut -d ' ' -f 3 "$dir"/latency.* | sort -n |
		awk -v tps="$(sed -n 's/^tps = \([0-9.]*\).*/\1/p' "$dir/out")" '
			{ value[NR] = $1 / 1000; sum += value[NR] }
			function at(part) { return value[int((NR * part + 99) / 100)] }
			END { printf "%.0f %.3f %.3f %.3f %.3f\n", tps, sum / NR, at(50), at(95), at(99) }'
}

# medians FILE: of each column of numbers, as CSV
medians() {
	local column columns values=()

	columns=$(head -n 1 "$1" | wc -w)
	for ((column = 1; column <= columns; column++)); do
		values+=("$(cut -d ' ' -f $column "$1" | quartile 2)")
	done
	(IFS=, && echo "${values[*]}")
}
