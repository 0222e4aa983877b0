# shellcheck shell=bash
# Sourced by the launch scripts: what compilers and networks are told, and how a run is started and watched.
# XLA and libtpu end a program at a flag they do not know; tests/launch shows each of these to the installed versions.

# Collectives need no flag to be asynchronous on GPUs any more. No flag of these has been timed by us.
gpu_flags() {
  local flags=(
    --xla_gpu_enable_latency_hiding_scheduler=true    # collectives start early; compute runs meanwhile
    --xla_gpu_enable_pipelined_all_gather=true        # FSDP: a block's parameters are gathered one block ahead
    --xla_gpu_enable_pipelined_all_reduce=true        # the same for sums over devices within the loop
    --xla_gpu_enable_while_loop_double_buffering=true # else the loop copies what was gathered ahead
  )
  export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}" # yours come last, so they win
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9} # of a GPU; jax would take 0.75
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # else NCCL fails without giving a reason
}

# All are libtpu 0.0.42's defaults: the compiled programs are the same without them. They stand here because turning off any
# one of the first six takes the overlap away, and another libtpu may choose otherwise.
tpu_flags() {
  local flags=(
    --xla_tpu_enable_latency_hiding_scheduler=true               # collectives start early; compute runs meanwhile
    --xla_enable_async_all_gather=true                           # FSDP: gathers of parameters have a start and an end
    --xla_tpu_enable_async_collective_fusion=true                # a gather runs inside a matrix product
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    --xla_tpu_enable_async_collective_fusion_multiple_steps=true # … or inside several, one after the other
    --xla_tpu_overlap_compute_collective_tc=true                 # compute and collectives overlap on the core
    --xla_tpu_data_parallel_opt_different_sized_ops=true         # several slices: so do sums between them
  )
  export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS:-}" # yours come last, so they win
}

# train_command ARGUMENTS… sets the array `command`, from these variables too:
#   PROFILE_AT=1000         a profile of the five steps from step 1000 on goes to WORKDIR/profile
#   COMPILATION_CACHE=DIR   compiled programs, so that a restart need not compile; default WORKDIR/compilation_cache, "" = none
#   DECO=.venv/bin/deco     the program
train_command() {
  command=("${DECO:-.venv/bin/deco}" train)
  if [[ -n ${PROFILE_AT:-} ]]; then command+=("--config.train.profile_at=$PROFILE_AT"); fi
  if [[ -v COMPILATION_CACHE ]]; then command+=("--config.train.compilation_cache=$COMPILATION_CACHE"); fi
  command+=("$@")
}

# is_final CODE: whether another start would end the same way.
# 0: finished, or told to stop and saved. 2: bad input. 126, 127: the program cannot be run, or is not there.
is_final() { [[ $1 =~ ^(0|2|126|127)$ ]]; }

# How SIGTERM reaches what `run` started, process $child.
pass_on() { kill -TERM "$child" 2>/dev/null || true; }

# run COMMAND… runs it, passes SIGTERM and Ctrl-C on to it as SIGTERM, and returns its exit code; $stopped is then not empty.
# It runs in the background because bash looks at a signal only between commands, or in `wait`.
run() {
  local code signals=0 seen
  stopped='' child=''
  trap 'stopped=1; signals=$((signals + 1)); [[ -z $child ]] || pass_on' TERM INT
  "$@" &
  child=$!
  [[ -z $stopped ]] || pass_on
  while :; do
    seen=$signals code=0
    wait "$child" || code=$?
    ((signals > seen)) || break # else it was the signal that ended `wait`
  done
  trap - TERM INT
  return "$code"
}
