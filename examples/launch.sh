# shellcheck shell=bash
# What every launch script does the same way; source it, set the variables of the recipe, then call `launch ENTRY ARGS...`.
#
# Reads: NPUS_PER_NODE, MASTER_PORT, HOSTFILE (empty: this machine alone), MASTER_ADDR, NNODES, NODE_RANK, TP, PP, CP, MBS,
#        GRAD_ACC_STEP, SAVE_PATH, LOG_DIR, MM_DEVICE.
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
        MASTER_ADDR="${MASTER_ADDR:-localhost}"
        NNODES="${NNODES:-1}"
        NODE_RANK="${NODE_RANK:-0}"
        return
    fi
    [[ -f "$HOSTFILE" ]] ||
        fail 11 "HOSTFILE=$HOSTFILE does not exist." "Write one host name or address a line, the first is the master."
    local hosts repeated row
    mapfile -t hosts < <(read_hostfile "$HOSTFILE")
    ((${#hosts[@]} > 0)) ||
        fail 11 "$HOSTFILE names no host." "Write one host name or address a line, the first is the master."
    repeated="$(printf '%s\n' "${hosts[@]}" | sort | uniq -d | tr '\n' ' ')"
    [[ -z "$repeated" ]] || fail 11 "$HOSTFILE names a host twice: $repeated"
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
    [[ -n "${NODE_RANK:-}" ]] || fail 11 "none of the $NNODES hosts in $HOSTFILE is this machine: ${hosts[*]}" \
        "This machine answers to: $(tr '\n' ' ' <<<"$OWN_NAMES")" \
        "Add one of these to the file, or set NODE_RANK to this machine's line (the first is 0)."
    echo "MASTER_ADDR=$MASTER_ADDR NODE_ADDR=${hosts[NODE_RANK]} NODE_RANK=$NODE_RANK NNODES=$NNODES"
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
    local log status=0 child
    mkdir -p "$LOG_DIR"
    log="$LOG_DIR/train_$(date +%Y%m%d_%H%M%S).log"
    torchrun "${DISTRIBUTED_ARGS[@]}" "$@" 2>&1 | tee "$log" || status=$?
    chmod 440 "$log"
    if [[ -d "$SAVE_PATH" ]]; then
        find "$SAVE_PATH" -type d -exec chmod 750 {} +
        find "$SAVE_PATH" -type f -exec chmod 640 {} +
    fi
    if ((status != 0)); then
        # torchrun itself always ends with 1; the exit code of the process that failed first stands last in its report.
        child="$(sed -nE 's/^ *exitcode *: *([0-9]+).*/\1/p' "$log" | tail -n 1)"
        fail "${child:-$status}" "training failed with exit code ${child:-$status}; the log is $log"
    fi
    sum_up "$log"
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
