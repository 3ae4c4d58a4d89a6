# Parts of setup.sh and setup-vllm.sh, which source this file and set `pip`, the pip of their environment.

# pip would compile all modules one by one, most of its time; compile_all does it on all cores
install=("${pip[@]}" install --quiet --no-compile)

is_cuda_build() { # ARGUMENTS OF pip install...: would pip's own choice of torch bring CUDA along?
  local report
  report="$("${pip[@]}" install --dry-run --quiet --report - "$@" 2>/dev/null)" || return 1
  grep -Eq '"name": *"(nvidia-|cuda-|triton)' <<<"$report"
}
compile_all() { # what cannot be compiled is for another Python; tests of libraries are never imported
  "${pip[0]}" -m compileall -qq -j 0 -x '/tests?/' "$("${pip[0]}" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
}
