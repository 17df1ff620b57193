#!/usr/bin/env bash
# Two processes share a real model's prefix through a daemon of their own: cold, then warm. `./dev demo [--json]` calls it.
#
# A prompt as agents have it (a long text that every request begins with; here this project's own pages) and two questions. What is shown:
# how long each process takes to its first token; that with codecs that lose nothing the warm one says, token by token, what a process
# without kvd says; what the default codecs cost in next-token KL; how prompts behave that end in odd places; and workers that attend to
# the prefix through the daemon instead of fetching it (ggml/show-attention.sh).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$here/../../.." && pwd)
build=${KVD_BUILDDIR:-$top/build/release}
prefix_tokens=5120 # 80 blocks; the model reuses any number of them
fidelity_prefix=4096
fidelity_tail=256
want_json=no

case ${1-} in
'') ;;
--json) want_json=yes ;;
*)
    echo "usage: demo.sh [--json]" >&2
    exit 2
    ;;
esac

# shellcheck source=client/engines/showing.sh
. "$here/../showing.sh"

# How long an engine's thread spins before it sleeps: a fraction of what is usual, as other programs may want the cores.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT-20000}

engine=$("$here/fetch.sh" engine)
model=$("$here/fetch.sh" model)
"$here/build.sh" "$engine" "$build" "$build/llama"
begin_showing

# worker NAME ARGS...: one process; its figures go to NAME.json.
worker()
{
    local name=$1
    shift
    "$build/llama/kvd-llama" --model "$model" --json "$@" >"$work/$name.json" || die "the worker \"$name\" failed"
}

{
    echo "You are an assistant that answers questions about the program described in these pages."
    cat "$top"/docs/{overview,design,operations,protocol,shared-memory,codecs,eviction}.md
} >"$work/prompt"
printf 'A text of its own. %s\n' "$(sed 's/kvd/the program/g; 60q' "$top/docs/operations.md" | head -c 900)" >"$work/other"
shared=(--prompt-file "$work/prompt" --prompt-tokens "$prefix_tokens")
first_question=$'\n\nQuestion: What is a block?\nAnswer: A block is'
second_question=$'\n\nQuestion: What happens when a worker dies?\nAnswer: When a worker dies,'
kvd=(--socket "$work/kvd.sock")
raw=(--codec-k raw --codec-v raw --codec-first raw)

start_daemon
show "A prompt of $prefix_tokens tokens and a question; gemma-3-270m on $(nproc) cores."
show ""

worker cold "${shared[@]}" --question "$first_question" "${kvd[@]}"
worker warm "${shared[@]}" --question "$second_question" "${kvd[@]}"
(($(of cold prompt_tokens) > prefix_tokens)) || die "the prompt has only $(of cold prompt_tokens) tokens"
[[ $(of warm kvd) == true ]] || die "the worker did not reach the daemon"
cold_ms=$(of cold ttft_ms)
warm_ms=$(of warm ttft_ms)
speedup=$(calc "$cold_ms / $warm_ms" .1f)
bytes_ratio=$(calc "$(of warm block_bytes) / $(of warm block_fp16_bytes)" .4f)
show "Default codecs (K kc4, V tq4, a prompt's first block as it is)"
show "    first process, nothing cached:    first token after $(calc "$cold_ms" .0f) ms ($(of cold blocks_published) blocks published)"
show "    second process, other question:   first token after $(calc "$warm_ms" .0f) ms, $speedup times sooner" \
    "($(of warm reused_tokens) of $(of warm prompt_tokens) tokens from the cache:" \
    "match $(calc "$(of warm match_ms)" .2f), load $(calc "$(of warm load_ms)" .1f), into the engine $(calc "$(of warm put_ms)" .1f) ms)"
show "    it goes on: $(of warm text | tr -s '[:space:]' ' ' | cut -c 1-100)"
show "    bytes of a block: $(of warm block_bytes), in fp16 $(of warm block_fp16_bytes): 1/$(calc "1 / $bytes_ratio" .2f)"

# On the same weights stored as F32: with quantised ones the engine rounds activations to 8 bits, and what that alone changes is more
# than what the codecs change.
model_f32=$("$here/fetch.sh" model-f32)
"$build/llama/kvd-llama" --model "$model_f32" --fidelity "${kvd[@]}" --prefix-tokens $fidelity_prefix --tail-tokens $fidelity_tail \
    "$work/prompt" >"$work/fidelity.jsonl" || die "the measurement of the codecs failed"
tail -n 1 "$work/fidelity.jsonl" >"$work/fidelity.json"
show "    next-token KL over $fidelity_tail tokens after $fidelity_prefix cached ones, against fp16: $(of fidelity value) nats (p99 $(of fidelity kl_p99));" \
    "the same most likely token: $(calc "100 * $(of fidelity top1)" .1f) %"
show ""

show "Raw codecs, which lose nothing"
worker without "${shared[@]}" --question "$second_question" --no-kvd
worker raw_cold "${shared[@]}" --question "$first_question" "${kvd[@]}" "${raw[@]}"
worker raw_warm "${shared[@]}" --question "$second_question" "${kvd[@]}" "${raw[@]}"
tokens_equal=false
[[ $(of raw_warm tokens) != "$(of without tokens)" ]] || tokens_equal=true
show "    without kvd $(calc "$(of without ttft_ms)" .0f) ms; cold $(calc "$(of raw_cold ttft_ms)" .0f) ms;" \
    "warm $(calc "$(of raw_warm ttft_ms)" .0f) ms"
expect "tokens from the cache" "$(of raw_warm reused_tokens)" "$prefix_tokens"
expect "all $(of without tokens | tr ',' '\n' | wc -l) generated tokens as without kvd" "$tokens_equal" true
show ""

# edge NAME ARGS...: a prompt without kvd, with what the runs above left in the cache, and once more.
edge()
{
    local name=$1
    shift
    worker "${name}_without" --prompt-file "$work/prompt" --n-predict 8 --no-kvd "$@"
    worker "${name}_raw" --prompt-file "$work/prompt" --n-predict 8 "${kvd[@]}" "${raw[@]}" "$@"
    worker "${name}_default" --prompt-file "$work/prompt" --n-predict 8 "${kvd[@]}" "$@"
    expect "generated tokens with raw codecs as without kvd" "$(of "${name}_raw" tokens)" "$(of "${name}_without" tokens)"
}

show "Prompts that end in odd places"
show "  shorter than a block (40 tokens)"
edge short --prompt-tokens 40
expect "tokens from the cache" "$(of short_default reused_tokens)" 0
expect "blocks published" "$(of short_default blocks_published)" 0
show "  an exact multiple of the block (1,024 tokens): one token at least is computed"
edge multiple --prompt-tokens 1024
expect "tokens from the cache" "$(of multiple_default reused_tokens)" 960
expect "tokens from the cache, every bit as without kvd" "$(of multiple_raw reused_tokens)" 512
show "  sharing half of a block (1,056 tokens, then another text): only whole blocks are shared"
edge half --prompt-tokens 1056 --question "$(cat "$work/other")"
expect "tokens from the cache" "$(of half_default reused_tokens)" 1024
expect "tokens from the cache, every bit as without kvd" "$(of half_raw reused_tokens)" 1024
show ""

edge_wrong=$n_wrong
show "Attention over the cache's blocks by the daemon, which no worker fetches"
"$here/../ggml/show-attention.sh" --json >"$work/attention" || n_wrong=$((n_wrong + 1))
sed '$d' "$work/attention"
tail -n 1 "$work/attention" >"$work/attention.json"
[[ $(head -c 1 "$work/attention.json") == "{" ]] || die "attention could not be shown"
show ""

show "Warm within a tenth of cold: $(calc "10 * $warm_ms <= $cold_ms" d | sed 's/1/yes/; s/0/no/')." \
    "Everything above as it should be: $( ((n_wrong == 0)) && echo yes || echo "no, $n_wrong things are not")."

if [[ $want_json == yes ]]; then
    printf '{"prefix_tokens":%d,"ttft_cold_ms":%s,"ttft_warm_ms":%s,"speedup":%s,"reused_tokens":%s,"tokens_equal":%s,' \
        "$prefix_tokens" "$cold_ms" "$warm_ms" "$speedup" "$(of warm reused_tokens)" "$tokens_equal"
    printf '"kl_nats":%s,"top1":%s,"kl_prefix_tokens":%d,"bytes_ratio":%s,"codec":"kc4/tq4, first block raw",' \
        "$(of fidelity value)" "$(of fidelity top1)" "$fidelity_prefix" "$bytes_ratio"
    printf '"ttft_without_ms":%s,"ttft_raw_warm_ms":%s,"match_ms":%s,"load_ms":%s,"put_ms":%s,"edge_prompts_wrong":%d,"cores":%d,"attention":%s}\n' \
        "$(of without ttft_ms)" "$(of raw_warm ttft_ms)" "$(of warm match_ms)" "$(of warm load_ms)" "$(of warm put_ms)" \
        "$edge_wrong" "$(nproc)" "$(cat "$work/attention.json")"
fi
((n_wrong == 0))
