# shellcheck shell=bash
# What every launch script does the same way; source it, set the variables of the recipe, then call `launch ENTRY ARGS...`.
#
# Reads: NPUS_PER_NODE, MASTER_PORT, HOSTFILE (empty: NNODES, NODE_RANK and MASTER_ADDR say it, or this machine is alone), TP,
#        PP, CP, MBS, GRAD_ACC_STEP, SAVE_PATH, LOG_DIR, MM_DEVICE, DRY_RUN.
# Sets:  DEVICE, NNODES, NODE_RANK, MASTER_ADDR, WORLD_SIZE, DP, GBS, DISTRIBUTED_ARGS.

fail() {  # fail CODE TEXT...: end the script the way the Python side does (2 configuration, 11 environment)
    local code=$1
    shift
    printf 'launch: %s\n' "$@" >&2
    exit "$code"
}

detect_device() {  # npu, cuda or cpu; MM_DEVICE overrides
    if [[ -n "${MM_DEVICE:-}" ]]; then echo "$MM_DEVICE"
    elif compgen -G '/dev/davinci[0-9]*' >/dev/null; then echo npu
    elif [[ "$(count_devices cuda)" -gt 0 ]]; then echo cuda
    else echo cpu
    fi
}

count_devices() {  # accelerators of kind $1 on this machine; nothing for cpu, where any number of processes may run
    case "$1" in
        npu) { compgen -G '/dev/davinci[0-9]*' || true; } | wc -l ;;
        cuda) { nvidia-smi -L || true; } 2>/dev/null | { grep -c '^GPU' || true; } ;;
    esac
}

set_device_environment() {  # the rest (HCCL_CONNECT_TIMEOUT and the like) has its defaults in mindspeed_mm/platform
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    export MM_DEVICE="$DEVICE"
    if [[ "$DEVICE" != npu ]]; then return; fi
    local setup="${ASCEND_ENV:-/usr/local/Ascend/ascend-toolkit/set_env.sh}"
    if [[ -f "$setup" ]]; then
        set +u  # the vendor's script reads variables that may be unset
        # shellcheck disable=SC1090
        source "$setup"
        set -u
    fi
}

read_hostfile() {  # the first word of every line that is neither empty nor a comment; a missing last newline loses nothing
    local line
    while IFS= read -r line || [[ -n "$line" ]]; do
        line="${line%%#*}"
        line="${line%$'\r'}"
        read -r line _ <<<"$line" || true
        if [[ -n "$line" ]]; then echo "$line"; fi
    done <"$1"
}

own_names() {  # every name and address of this machine, one a line
    { hostname; hostname -s; hostname -f; hostname -I; } 2>/dev/null | tr -s ' ' '\n' | grep -v '^$' | sort -u
}

is_own_host() {  # is $1 a name or an address of this machine, or a name that resolves to one of its addresses?
    local address
    if grep -qixF -- "$1" <<<"$OWN_NAMES"; then return 0; fi
    while read -r address _; do
        if grep -qxF -- "$address" <<<"$OWN_NAMES"; then return 0; fi
    done < <(getent ahosts "$1" 2>/dev/null || true)
    return 1
}

find_nodes() {  # MASTER_ADDR, NNODES, NODE_RANK, from HOSTFILE where one is given
    if [[ -z "${HOSTFILE:-}" ]]; then
        check_nodes
        return
    fi
    [[ -f "$HOSTFILE" ]] ||
        fail 11 "HOSTFILE=$HOSTFILE does not exist." "Write one host name or address a line, the first is the master." \
            "Without a file, set HOSTFILE= and, for several machines, NNODES, NODE_RANK and MASTER_ADDR."
    local hosts repeated row
    mapfile -t hosts < <(read_hostfile "$HOSTFILE")
    ((${#hosts[@]} > 0)) ||
        fail 11 "$HOSTFILE names no host." "Write one host name or address a line, the first is the master."
    repeated="$(printf '%s\n' "${hosts[@]}" | sort | uniq -d | tr '\n' ' ')"
    [[ -z "$repeated" ]] || fail 11 "$HOSTFILE names a host twice: $repeated"
    [[ "${NNODES:-${#hosts[@]}}" == "${#hosts[@]}" ]] ||
        fail 11 "NNODES=$NNODES, but $HOSTFILE names ${#hosts[@]} hosts; unset NNODES, or set HOSTFILE= to go by NNODES."
    MASTER_ADDR="${hosts[0]}"
    NNODES="${#hosts[@]}"
    if [[ -n "${NODE_RANK:-}" ]]; then
        [[ "$NODE_RANK" =~ ^[0-9]+$ && "$NODE_RANK" -lt "$NNODES" ]] ||
            fail 11 "NODE_RANK=$NODE_RANK is not a line of $HOSTFILE: it has $NNODES hosts, the first is 0."
        echo "MASTER_ADDR=$MASTER_ADDR NODE_ADDR=${hosts[NODE_RANK]} NODE_RANK=$NODE_RANK (as set) NNODES=$NNODES"
        return
    fi
    OWN_NAMES="$(own_names)"
    for row in "${!hosts[@]}"; do
        if is_own_host "${hosts[row]}"; then
            [[ -z "${NODE_RANK:-}" ]] ||
                fail 11 "$HOSTFILE names this machine twice: ${hosts[NODE_RANK]} and ${hosts[row]}."
            NODE_RANK="$row"
        fi
    done
    if [[ -z "${NODE_RANK:-}" && "${DRY_RUN:-0}" != 0 ]]; then
        NODE_RANK=0
        echo "MASTER_ADDR=$MASTER_ADDR NNODES=$NNODES (this machine is not in $HOSTFILE; a dry run needs no place)"
        return
    fi
    [[ -n "${NODE_RANK:-}" ]] || fail 11 "none of the $NNODES hosts in $HOSTFILE is this machine: ${hosts[*]}" \
        "This machine answers to: $(tr '\n' ' ' <<<"$OWN_NAMES")" \
        "Add one of these to the file, or set NODE_RANK to this machine's line (the first is 0)."
    echo "MASTER_ADDR=$MASTER_ADDR NODE_ADDR=${hosts[NODE_RANK]} NODE_RANK=$NODE_RANK NNODES=$NNODES"
}

check_nodes() {  # NNODES, NODE_RANK and MASTER_ADDR as a scheduler sets them; one machine without them
    NNODES="${NNODES:-1}"
    [[ "$NNODES" =~ ^[1-9][0-9]*$ ]] || fail 11 "NNODES=$NNODES is not a number of machines."
    if ((NNODES == 1)) || [[ "${DRY_RUN:-0}" != 0 ]]; then
        NODE_RANK="${NODE_RANK:-0}"
        MASTER_ADDR="${MASTER_ADDR:-localhost}"
    fi
    [[ -n "${NODE_RANK:-}" && -n "${MASTER_ADDR:-}" ]] ||
        fail 11 "NNODES=$NNODES, but NODE_RANK='${NODE_RANK:-}' and MASTER_ADDR='${MASTER_ADDR:-}'." \
            "Several machines need both: MASTER_ADDR is the first machine, NODE_RANK counts them from 0." \
            "Or name the machines in a file and set HOSTFILE."
    [[ "$NODE_RANK" =~ ^[0-9]+$ && "$NODE_RANK" -lt "$NNODES" ]] ||
        fail 11 "NODE_RANK=$NODE_RANK with NNODES=$NNODES: it goes from 0 to $((NNODES - 1))."
}

prepare_launch() {  # everything that depends on the machine; call it after the recipe's variables are set
    DEVICE="$(detect_device)"
    set_device_environment
    find_nodes
    local available model_parallel=$((TP * PP * CP))
    available="$(count_devices "$DEVICE")"
    if [[ -n "$available" && "$NPUS_PER_NODE" -gt "$available" && "${DRY_RUN:-0}" == 0 ]]; then
        fail 11 "NPUS_PER_NODE=$NPUS_PER_NODE, but this machine has $available $DEVICE device(s); set NPUS_PER_NODE."
    fi
    WORLD_SIZE=$((NPUS_PER_NODE * NNODES))
    if ((WORLD_SIZE % model_parallel != 0)); then
        fail 2 "$WORLD_SIZE processes (NPUS_PER_NODE=$NPUS_PER_NODE x NNODES=$NNODES) cannot be divided into replicas of \
$model_parallel (TP=$TP x PP=$PP x CP=$CP)." "Change NPUS_PER_NODE or the parallel sizes."
    fi
    DP=$((WORLD_SIZE / model_parallel))
    GBS=$((MBS * GRAD_ACC_STEP * DP))
    DISTRIBUTED_ARGS=(
        --nproc_per_node "$NPUS_PER_NODE"
        --nnodes "$NNODES"
        --node_rank "$NODE_RANK"
        --master_addr "$MASTER_ADDR"
        --master_port "$MASTER_PORT"
    )
    echo "device $DEVICE, $WORLD_SIZE processes: TP $TP, PP $PP, CP $CP, DP $DP; global batch size $GBS"
}

launch() {  # launch ENTRY ARGS...: run under torchrun with a log, then sum up; --dry-run among ARGS needs neither
    local argument
    for argument in "$@"; do
        if [[ "$argument" == --dry-run ]]; then exec python "$@" --world-size "$WORLD_SIZE"; fi
    done
    command -v torchrun >/dev/null ||
        fail 11 "torchrun is not on PATH; activate the environment first: source .venv/bin/activate"
    local log status=0
    mkdir -p "$LOG_DIR"
    log="$LOG_DIR/train_$(date +%Y%m%d_%H%M%S)"
    # The machines of a job often share the directory and start in the same second.
    if ((NNODES > 1)); then log+="_node$NODE_RANK"; fi
    log+=.log
    run_logged "$log" torchrun "${DISTRIBUTED_ARGS[@]}" "$@" || status=$?
    chmod 440 "$log"
    if [[ -d "$SAVE_PATH" ]]; then
        find "$SAVE_PATH" -type d -exec chmod 750 {} +
        find "$SAVE_PATH" -type f -exec chmod 640 {} +
    fi
    if ((status != 0)); then explain_failure "$log" "$status"; fi
    sum_up "$log"
}

run_logged() {  # run_logged LOG COMMAND...: SIGTERM goes on to the command, which saves; the log stays open until it ends
    local log=$1 status=0 out writer child
    shift
    exec {out}> >(trap '' TERM INT; exec tee "$log")
    writer=$!
    "$@" >&"$out" 2>&1 {out}>&- &
    child=$!
    # shellcheck disable=SC2064
    trap "kill -TERM $child 2>/dev/null || true" TERM
    wait "$child" || status=$?
    # A signal ends `wait`, not the command.
    while kill -0 "$child" 2>/dev/null; do
        status=0
        wait "$child" || status=$?
    done
    trap - TERM
    exec {out}>&-
    wait "$writer" || true
    return "$status"
}

explain_failure() {  # explain_failure LOG STATUS: end as the process that failed first did
    local code
    # torchrun itself always ends with 1; the exit code of the process that failed first stands last in its report.
    code="$(sed -nE 's/^ *exitcode *: *(-?[0-9]+).*/\1/p' "$1" | tail -n 1)"
    if [[ "$code" == -* ]]; then
        fail 14 "training failed: signal ${code#-} ended a process of this machine (9 is often the kernel's, for want of memory: \
see dmesg); the log is $1"
    fi
    # torchrun makes no report when it was asked to stop.
    if [[ -z "$code" ]] && grep -q '^\(\[rank [0-9]*\] \)\?InterruptedRunError' "$1"; then code=18; fi
    code="${code:-$2}"
    fail "$code" "training failed with exit code $code; the log is $1"
}

window() {  # the last hundred of the first 150 iteration lines in $1: what comes before is warm-up
    awk '/elapsed time per iteration/ && n < 150 {line[++n] = $0}
        END {for (i = (n > 100 ? n - 99 : 1); i <= n; i++) print line[i]}' "$1"
}

sum_up() {  # print the average speed that the log $1 shows; the log of a node without the last rank has no such lines
    local elapsed samples tokens
    if ! grep -q 'elapsed time per iteration' "$1"; then return; fi
    elapsed="$(window "$1" | awk -F: '{split($5, part, "|"); sum += part[1]} END {printf "%.1f", sum / NR}')"
    samples="$(awk -v gbs="$GBS" -v ms="$elapsed" 'BEGIN {printf "%.3f", gbs * 1000 / ms}')"
    echo "Elapsed Time Per iteration: $elapsed"
    echo "Average Samples per Second: $samples"
    tokens="$(window "$1" | awk -F'tokens per sample:' 'NF > 1 {split($2, part, "|"); sum += part[1]; n++}
        END {if (n) printf "%.10g", sum / n}')"
    if [[ -n "$tokens" ]]; then
        awk -v s="$samples" -v t="$tokens" 'BEGIN {printf "Consumed Tokens per Second: %.3f\n", s * t}'
    fi
}
