#!/usr/bin/env bash
# A real model whose attention over a shared prefix is the daemon's, next to the same worker attending to the decoded blocks.
#
#   show-attention.sh [--json]
#
# One kvd-llama process computes a prefix of 4,096 tokens; kvd-ggml processes go on from it. What is shown: that all forms of attention
# give the same 256 tokens, and how far their next-token distributions are apart; eight processes that generate at the same time over
# the prefix, of which one is killed in the middle; and workers whose daemon is killed in the middle. `./dev demo` runs this too.
# The model is the one stored as F32: with quantised weights every difference in a last bit is rounded to 8 bits, and grows.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../../.." && pwd)
llama=$here/../llama
build=${KVD_BUILDDIR:-$top/build/release}
prefix_tokens=4096
steps=256
group_steps=96 # of each of eight processes
most_kl=1e-4   # where two forms' most likely tokens differ
want_json=no

case ${1-} in
'') ;;
--json) want_json=yes ;;
*)
    sed -n '3,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed '/^set/d' >&2
    exit 2
    ;;
esac

# shellcheck source=client/engines/showing.sh
. "$here/../showing.sh"

# How long an engine's thread spins before it sleeps: briefly. Several processes and the daemon want the cores.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT-1000}

engine=$("$llama/fetch.sh" engine)
model=$("$llama/fetch.sh" model-f32)
"$llama/build.sh" "$engine" "$build" "$build/llama"
"$here/build-ggml.sh" "$engine" "$build" "$build/ggml"
begin_showing
start_daemon

"$build/ggml/check_gemma" "$model" "$top/docs/operations.md" >"$work/graph" || die "the graph is not the model's"
"$build/ggml/check_refusals" "$work" >"$work/refusals" 2>&1 || die "a file is taken or refused for the wrong reason: $(cat "$work/refusals")"
cat "$top"/docs/{overview,design,operations,protocol,shared-memory,codecs,eviction}.md >"$work/prompt"
questions=(
    $'\n\nQuestion: What is a block?\nAnswer: A block is'
    $'\n\nQuestion: What happens when a worker dies?\nAnswer: When a worker dies,'
    $'\n\nQuestion: How are keys made?\nAnswer: A key is'
    $'\n\nQuestion: What does the daemon do when memory is short?\nAnswer: When memory is short,'
)
# The file's digest, once for all processes: a gigabyte.
shared=(--model "$model" --revision "$(sha256sum <"$model" | cut -d ' ' -f 1)" --socket "$work/kvd.sock"
    --prompt-file "$work/prompt" --prompt-tokens "$prefix_tokens")

# worker NAME QUESTION ARGS...: one process; its figures go to NAME.json.
worker()
{
    local name=$1 question=$2
    shift 2
    "$build/ggml/kvd-ggml" "${shared[@]}" --question "${questions[question]}" --json "$@" >"$work/$name.json" 2>"$work/$name.log" ||
        die "the worker \"$name\" failed: $(cat "$work/$name.log")"
}

# counter NAME: of the daemon's.
counter()
{
    "$build/kvctl" --socket="$work/kvd.sock" stats | awk -v name="kvd_$1_total" '$1 == name {print $2}'
}

show "A prefix of $prefix_tokens tokens, computed by kvd-llama; kvd-ggml goes on from it. gemma-3-270m in F32 on $(nproc) cores."
show "    kvd-ggml's graph: $(cat "$work/graph")"
"$build/llama/kvd-llama" "${shared[@]}" --question "${questions[0]}" --n-predict 1 --json >"$work/cold.json" || die "kvd-llama failed"

for form in plain local daemon auto; do
    worker "$form" 0 --attend "$form" --n-predict "$steps"
    [[ $(of "$form" reused_tokens) == "$prefix_tokens" ]] || die "$form: only $(of "$form" reused_tokens) tokens came from the cache"
    show "$(printf '    %-8s first token after %4.0f ms, then %5.1f ms a token (layers: %s plain, %s local, %s daemon)' "$form" \
        "$(of "$form" ttft_ms)" "$(of "$form" ms_per_token)" "$(of "$form" layers_plain)" "$(of "$form" layers_local)" \
        "$(of "$form" layers_daemon)")"
done
expect "requests that the daemon failed at" "$(of daemon attend_fallbacks)" 0
for form in local daemon; do
    worker "compare_$form" 0 --compare "$form" --n-predict "$steps"
    show "    $form against plain, $steps steps: KL $(of "compare_$form" kl_mean) nats in the mean, $(of "compare_$form" kl_max) at most;" \
        "the same most likely token $(of "compare_$form" same_top) times"
    if [[ $(of plain tokens) == "$(of "$form" tokens)" ]]; then
        show "    $form: the same $steps tokens as plain"
    else
        expect "$form: other tokens than plain, and KL where they part at most $most_kl" \
            "$(calc "$(of "compare_$form" kl_parted) <= $most_kl" d)" 1
    fi
done
show ""

show "Eight processes at once over this prefix, by the daemon; one of them is killed in the middle"
for question in 0 1 2 3; do
    worker "alone$question" "$question" --attend plain --n-predict "$group_steps"
done
read -ra before <<<"$(counter attend_batches) $(counter attend_batched) $(counter attend_read_bytes) $(counter attend_needed_bytes)"
begun=$EPOCHREALTIME
# generator I STEPS: one process of the group; it writes text as it generates, then its figures.
generator()
{
    exec "$build/ggml/kvd-ggml" "${shared[@]}" --question "${questions[$1 % 4]}" --attend daemon --threads 1 --n-predict "$2" \
        >"$work/group$1" 2>"$work/group$1.log"
}
pids=()
for i in 0 1 2 3 4 5 6; do
    generator "$i" "$group_steps" &
    pids+=($!)
done
generator 7 2000 &
victim=$!
# It dies when all have said something.
for i in 0 1 2 3 4 5 6 7; do
    while kill -0 "$victim" 2>/dev/null && [[ ! -s $work/group$i ]] && kill -0 "${pids[i]-$victim}" 2>/dev/null; do
        sleep 0.05
    done
done
kill -9 "$victim" || die "the process to be killed was gone already"
wait "$victim" 2>/dev/null || true
n_busy=0
for i in 0 1 2 3 4 5 6; do
    grep -q "^first token after" "$work/group$i" || n_busy=$((n_busy + 1))
done
for pid in "${pids[@]}"; do
    wait "$pid" || die "a process of the group failed: $(cat "$work"/group?.log)"
done
group_sec=$(calc "${EPOCHREALTIME/,/.} - ${begun/,/.}" .3f)
# same_text FILE NAME: it begins with what the worker NAME said.
same_text()
{
    of "$2" text | head -c -1 >"$work/said"
    head -c "$(stat -c %s "$work/said")" "$1" | cmp -s - "$work/said"
}
show "    when it was killed, $n_busy of the others were at work"
((n_busy > 0)) || die "none was: nothing has been shown"
n_same=0
for i in 0 1 2 3 4 5 6; do
    ! same_text "$work/group$i" "alone$((i % 4))" || n_same=$((n_same + 1))
done
expect "others that said what a worker alone says, attending to the decoded blocks" "$n_same" 7
expect "others whose requests the daemon never failed at" "$(cat "$work"/group[0-6] | grep -c "by the daemon, which failed 0 times")" 7
batches=$(($(counter attend_batches) - before[0]))
batched=$(($(counter attend_batched) - before[1]))
read_part=$(calc "($(counter attend_read_bytes) - ${before[2]}) / max(1, $(counter attend_needed_bytes) - ${before[3]})" .3f)
show "    $batched requests were computed in $batches passes, which read $read_part of the bytes that they would have read one by one"
show "    the seven generated $((7 * group_steps)) tokens in $(calc "$group_sec" .1f) s"
show ""

show "The daemon is killed while a worker uses it"
: >"$work/orphan"
"$build/ggml/kvd-ggml" "${shared[@]}" --question "${questions[0]}" --attend daemon --n-predict "$steps" >"$work/orphan" &
orphan=$!
while kill -0 "$orphan" 2>/dev/null && (($(stat -c %s "$work/orphan") < 64)); do
    sleep 0.02
done
kill -9 "$daemon_pid"
wait "$daemon_pid" 2>/dev/null || true
daemon_pid=
wait "$orphan" || die "the worker died with its daemon"
# Its text ends with its own words about it.
expect "the worker went on over the blocks that it had leased, to the same text" \
    "$(same_text "$work/orphan" plain && echo yes || echo no)" yes
show "    $(tail -n 1 "$work/orphan")"
! grep -q "by the daemon, which failed 0 times" "$work/orphan" || die "the daemon was killed too late: nothing has been shown"
expect "times that it computed the prefix itself" "$(grep -c "the cache failed" "$work/orphan" || true)" 0

if [[ $want_json == yes ]]; then
    printf '{"prefix_tokens":%d,"steps":%d,"plain_ms_per_token":%s,"local_ms_per_token":%s,"daemon_ms_per_token":%s,"auto_ms_per_token":%s,' \
        "$prefix_tokens" "$steps" "$(of plain ms_per_token)" "$(of local ms_per_token)" "$(of daemon ms_per_token)" "$(of auto ms_per_token)"
    printf '"plain_ttft_ms":%s,"daemon_ttft_ms":%s,"tokens_equal":%s,"kl_mean":%s,"kl_max":%s,"kl_parted":%s,' "$(of plain ttft_ms)" \
        "$(of daemon ttft_ms)" "$([[ $(of plain tokens) == "$(of daemon tokens)" ]] && echo true || echo false)" \
        "$(of compare_daemon kl_mean)" "$(of compare_daemon kl_max)" "$(of compare_daemon kl_parted)"
    printf '"group_processes":8,"group_killed":1,"group_same":%d,"group_sec":%s,"group_requests":%d,"group_passes":%d,' \
        "$n_same" "$group_sec" "$batched" "$batches"
    printf '"group_read_part":%s,"wrong":%d}\n' "$read_part" "$n_wrong"
fi
((n_wrong == 0))
