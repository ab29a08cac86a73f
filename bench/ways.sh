#!/bin/bash
#
# bench/ways.sh
#	  Ways to keep a request from being run twice, as scripts of pgbench.
#
# bench/rivals and bench/costs read this file.
#
# For new requests, with an order that has two lines as the work:
#
#	  bare				nothing: the work, which a repeat would do twice
#	  record			the work and an INSERT of the answer, which is the least
#						that any protection has to write
#	  select_insert		SELECT the key, INSERT it as pending, UPDATE it at the end
#	  on_conflict		INSERT ... ON CONFLICT DO NOTHING, UPDATE at the end
#	  two_phases		INSERT as pending and COMMIT; then lock the row with FOR
#						UPDATE SKIP LOCKED, work, UPDATE
#	  advisory			an advisory lock, SELECT, and INSERT at the end
#	  functions			on_conflict, with a PL/pgSQL function for each end
#	  claim				idempotency_begin and idempotency_finish
#	  run				idempotency_run, with the work in a function
#	  lease				idempotency_begin with a lease and COMMIT; then the work and
#						idempotency_finish
#
# A way with "_piped" at its end sends its first call together with BEGIN, and
# its last with COMMIT, as drivers with a pipeline mode can.  One with "tpcb_"
# before its name has the transaction of pgbench's TPC-B-like script as its
# work; with tpcb_run, and with tpcb_work, which is not protected, that
# transaction is a PL/pgSQL function.
#
# For repeats, which find the answer among $answers:
#
#	  select_repeat		a SELECT by the primary key
#	  on_conflict_repeat	INSERT ... ON CONFLICT DO NOTHING, then SELECT
#	  functions_repeat	the same in a PL/pgSQL function
#	  replay			idempotency_replay
#	  begin_repeat		idempotency_begin
#
# Keys are drawn at random, the new ones from so many that none comes twice.

# shellcheck source=bench/common.sh
. "$(dirname "$(readlink -f "$0")")/common.sh"

# the answers that are there before, for repeats
answers=100000

answer='{"order": 42, "status": "created"}'
scope="'acme', 'orders.create', :key"

# make_ways SCALE: make the tables, functions and answers
make_ways() {
	"$bindir/pgbench" -i -q -s "$1" >"$dir/out" 2>&1
	sql <<EOF
create extension idempotency;
create table orders (id bigint generated always as identity primary key, customer int not null);
create table order_line (order_id bigint not null references orders, line int not null,
	sku text not null, primary key (order_id, line));
create function create_order(request jsonb) returns json language plpgsql as \$\$
declare
	new_id bigint;
begin
	insert into orders (customer) values (request['customer']::int) returning id into new_id;
	insert into order_line values (new_id, 1, 'book-42'), (new_id, 2, 'pen-7');
	return json_build_object('order', new_id, 'status', 'created');
end \$\$;
create function transfer(request jsonb) returns json language plpgsql as \$\$
declare
	account int := request['aid'];
	change int := request['delta'];
	balance int;
begin
	update pgbench_accounts set abalance = abalance + change where aid = account;
	select abalance into balance from pgbench_accounts where aid = account;
	update pgbench_tellers set tbalance = tbalance + change where tid = request['tid']::int;
	update pgbench_branches set bbalance = bbalance + change where bid = request['bid']::int;
	insert into pgbench_history (tid, bid, aid, delta, mtime)
		values (request['tid']::int, request['bid']::int, account, change, current_timestamp);
	return json_build_object('balance', balance);
end \$\$;

-- what others keep, with the same key and an index to sweep by
create table rival (tenant text collate "C", action text collate "C", key text collate "C",
	state text not null, status_code int, response json,
	created_at timestamptz not null default now(),
	expires_at timestamptz not null default now() + interval '1 day',
	primary key (key, tenant, action));
create index on rival (expires_at);
create function rival_begin(tenant text, action text, key text) returns json language plpgsql as \$\$
declare
	found_response json;
begin
	insert into rival values (tenant, action, key, 'pending') on conflict do nothing;
	if found then
		return null;
	end if;
	select response into found_response from rival as r
	where (r.tenant, r.action, r.key) = (rival_begin.tenant, rival_begin.action, rival_begin.key);
	return found_response;
end \$\$;
create function rival_finish(tenant text, action text, key text, status_code int, response json)
	returns void language plpgsql as \$\$
begin
	update rival as r set state = 'completed', status_code = rival_finish.status_code,
		response = rival_finish.response
	where (r.tenant, r.action, r.key) = (rival_finish.tenant, rival_finish.action, rival_finish.key);
end \$\$;

insert into idempotency_key (tenant, action, key, actor, state, status_code, response,
		attempt, created_at, finished_at, expires_at)
	select 'acme', 'orders.create', key::text, '', 'completed', 201, '$answer', 1, now(), now(),
		now() + interval '1 day'
	from generate_series(1, $answers) as key;
insert into rival select tenant, action, key, state, status_code, response, created_at, expires_at
	from idempotency_key;
vacuum analyze;
checkpoint;
EOF
}

# way NAME: its transaction
way() {
	local name=${1#tpcb_} work=order piped=

	[ "$name" = "$1" ] || work=tpcb
	case $name in
		*_piped) piped=yes name=${name%_piped} ;;
	esac

	case $name in
		*repeat | replay) echo "\\set key random(1, $answers)" ;;
		*) echo '\set key random(1000000000, 9000000000000000000)' ;;
	esac
	[ $work = order ] || tpcb_numbers

	case $name in
		work) echo "select transfer($(request $work));" ;;
		run) echo "select outcome, status_code, response from idempotency_run($scope, $(request $work), '$(handler $work)');" ;;
		select_repeat) select_rival 'state, status_code, response' ;;
		on_conflict_repeat)
			echo 'begin;'
			insert_pending
			select_rival 'state, status_code, response'
			echo 'commit;' ;;
		functions_repeat) echo "select rival_begin($scope);" ;;
		replay) echo "select outcome, status_code, response from idempotency_replay($scope);" ;;
		begin_repeat) echo "select outcome, status_code, response from idempotency_begin($scope);" ;;
		*)
			pipe start
			echo 'begin;'
			first_calls "$name"
			pipe end
			"${work}_work"
			pipe start
			last_calls "$name"
			echo 'commit;'
			pipe end ;;
	esac
}

# pipe start|end: of what is sent together, if way sends anything so
pipe() {
	[ -z "$piped" ] || printf '\\%spipeline\n' "$1"
}

# first_calls WAY: what it does before the work
first_calls() {
	case $1 in
		select_insert)
			select_rival 'state, response'
			echo "insert into rival values ($scope, 'pending');" ;;
		on_conflict) insert_pending ;;
		two_phases)
			insert_pending
			printf 'commit;\nbegin;\n'
			select_rival state 'for update skip locked' ;;
		advisory)
			echo "select pg_advisory_xact_lock(hashtextextended(:key, 0));"
			select_rival 'state, response' ;;
		functions) echo "select rival_begin($scope);" ;;
		claim) echo "select outcome, status_code, response from idempotency_begin($scope);" ;;
		lease)
			echo "select outcome, claim from idempotency_begin($scope, lease => '1min') \\gset"
			printf 'commit;\nbegin;\n' ;;
	esac
}

# last_calls WAY: and after it
last_calls() {
	case $1 in
		record | advisory)
			echo "insert into rival values ($scope, 'completed', 201, '$answer');" ;;
		select_insert | on_conflict | two_phases)
			echo "update rival set state = 'completed', status_code = 201, response = '$answer' where (tenant, action, key) = ($scope);" ;;
		functions) echo "select rival_finish($scope, 201, '$answer');" ;;
		claim) echo "select idempotency_finish($scope, 201, '$answer');" ;;
		lease) echo "select idempotency_finish($scope, 201, '$answer', claim => :claim);" ;;
	esac
}

insert_pending() {
	echo "insert into rival values ($scope, 'pending') on conflict do nothing returning state;"
}

# select_rival COLUMNS [CLAUSE]
select_rival() {
	echo "select $1 from rival where (tenant, action, key) = ($scope) ${2-};"
}

order_work() {
	echo "select create_order('{\"customer\": 7}');"
}

# what pgbench's own script has, word by word
tpcb_numbers() {
	cat <<-'EOF'
		\set aid random(1, 100000 * :scale)
		\set bid random(1, 1 * :scale)
		\set tid random(1, 10 * :scale)
		\set delta random(-5000, 5000)
	EOF
}

tpcb_work() {
	cat <<-'EOF'
		UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;
		SELECT abalance FROM pgbench_accounts WHERE aid = :aid;
		UPDATE pgbench_tellers SET tbalance = tbalance + :delta WHERE tid = :tid;
		UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = :bid;
		INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (:tid, :bid, :aid, :delta, CURRENT_TIMESTAMP);
	EOF
}

# request order|tpcb: what a function is given to do the work
request() {
	case $1 in
		order) echo "'{\"customer\": 7}'" ;;
		tpcb) echo "jsonb_build_object('aid', :aid::int, 'bid', :bid::int, 'tid', :tid::int, 'delta', :delta::int)" ;;
	esac
}

handler() {
	case $1 in
		order) echo 'create_order(jsonb)' ;;
		tpcb) echo 'transfer(jsonb)' ;;
	esac
}

# round_trips WAY: how often its client waits for the server
round_trips() {
	way "$1" | awk '/^\\startpipeline/ { piped = 1 }
		/^\\endpipeline/ { piped = 0; n++ }
		/^[^\\]/ && !piped { n++ }
		END { print n }'
}
