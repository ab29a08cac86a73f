#!/bin/bash
#
# scripts/tests.sh
#	  What the scripts that run tests share: how packages of Node are installed, and
#	  how tests are counted.
#
# It is read inside of scripts/setup's folder.  Packages of Node come as the lock
# files say, and nothing of them runs at their installation.  Those of Python are
# Debian's, so what needs them runs /usr/bin/python3, whatever else is in PATH.
#
set -euo pipefail

export npm_config_audit=false npm_config_fund=false npm_config_update_notifier=false
export NEXT_TELEMETRY_DISABLED=1 CHECKPOINT_DISABLE=1
export PYTHONPATH=$PWD/clients/python/src PYTHONDONTWRITEBYTECODE=1

log=$IDEMPOTENCY_WORK/tests.log
summary=$IDEMPOTENCY_WORK/summary
passed=0
failed=0
: >"$summary"

# quietly COMMAND...: run a command whose output matters only when it fails
quietly() {
	"$@" >"$log" 2>&1 || { cat "$log"; return 1; }
}

# install_package FOLDER: install what a package needs, and build it
install_package() {
	quietly npm --prefix "$1" ci --ignore-scripts &&
		quietly npm --prefix "$1" run build --if-present
}

# The sums of what the runs in the log report: passed, failed and skipped.  node --test
# sums up in lines such as "# pass 3", or with another sign at the beginning, the last
# of which is about its duration; pytest in "3 passed, 1 skipped in 0.5s"; others in
# "3 passed, 0 failed".
counted() {
	awk '
		/^(#|ℹ) (tests|pass|fail|cancelled|skipped|todo) [0-9]+$/ { number[$2] = $3 }
		/^(#|ℹ) duration_ms / {
			good += number["pass"]
			bad += number["fail"] + number["cancelled"]
			left += number["skipped"] + number["todo"]
			split("", number)
		}
		/^(=+ )?[0-9]+ [a-z]+(, [0-9]+ [a-z]+)* in [0-9.]+s/ || /^[0-9]+ passed, [0-9]+ failed$/ {
			for (i = 1; i < NF; i++) {
				if ($(i + 1) ~ /^passed/) good += $i
				else if ($(i + 1) ~ /^(failed|errors?)/) bad += $i
				else if ($(i + 1) ~ /^(skipped|xfailed)/) left += $i
			}
		}
		END { print good + 0, bad + 0, left + 0 }' "$log"
}

# The names of the tests in the log that have failed
failures() {
	sed -nE 's/^ *(not ok [0-9]+ - |✖ |FAILED |ERROR |failed: )/  failed: /p' "$log" | sort -u | head -n 40
}

# run_tests NAME COMMAND...: run tests, for a quarter of an hour at most, and count them
run_tests() {
	local name=$1 status=0 good bad left

	printf '\n==== %s\n\n' "$name"
	shift
	timeout --kill-after=30 900 "$@" 2>&1 | tee "$log" || status=$?
	read -r good bad left < <(counted)

	# a run without a test, or one that fails without saying which, has failed
	if [ "$((good + bad))" = 0 ]; then
		echo "$name: no test was run" | tee -a "$summary"
		bad=1
	elif [ "$status" != 0 ] && [ "$bad" = 0 ]; then
		echo "$name: ended with status $status" | tee -a "$summary"
		bad=1
	fi
	printf '%s: %d passed, %d failed, %d skipped\n' "$name" "$good" "$bad" "$left" >>"$summary"
	[ "$bad" = 0 ] || failures >>"$summary" || true
	passed=$((passed + good))
	failed=$((failed + bad))
}

# run_check NAME COMMAND...: run a command that counts as one test
run_check() {
	local name=$1

	shift
	if "$@" >"$log" 2>&1; then
		echo "ok: $name"
		passed=$((passed + 1))
	else
		cat "$log"
		echo "failed: $name" | tee -a "$summary"
		failed=$((failed + 1))
	fi
}

# The sum of everything, and whether it is good
sum_up() {
	echo
	cat "$summary"
	printf '%d passed, %d failed\n' "$passed" "$failed"
	[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
}
