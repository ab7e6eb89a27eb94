# Enter the environment that setup.sh made:   . ./env.sh      (bash; after sourcing ROS 2, if you have it)
_il_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -f "$_il_root/.venv/ready" ]; then
  echo 'env.sh: nothing is built yet; run  bash setup.sh  first' >&2
  unset _il_root
  return 1
fi
if [[ $(cat "$_il_root/.venv/made-for") != "${ROS_DISTRO:-PyPI} $_il_root "* ]]; then
  echo "env.sh: .venv was made for ROS 2 $(cat "$_il_root/.venv/made-for"), this is ${ROS_DISTRO:-PyPI} $_il_root:" \
    'source that ROS 2 first, or run  bash setup.sh  again' >&2
  unset _il_root
  return 1
fi
. "$_il_root/.venv/bin/activate"
# Without a ROS 2 installation the venv itself is the ROS prefix.
[ -n "${ROS_DISTRO:-}" ] || export AMENT_PREFIX_PATH="$VIRTUAL_ENV${AMENT_PREFIX_PATH:+:$AMENT_PREFIX_PATH}"
. "$_il_root/install/local_setup.bash"
# The arms' descriptions come from PyPI, where xacro, RViz and Gazebo would not look: a package of the same name goes first.
for _il_prefix in "$VIRTUAL_ENV"/lib/python3*/site-packages/cmeel.prefix; do
  [ -d "$_il_prefix" ] && export AMENT_PREFIX_PATH="$AMENT_PREFIX_PATH:$_il_prefix"
done
# Robots are not found, and not driven, across the network unless you say so after this: SUBNET is what ROS 2 itself sets when
# it is sourced.
if [[ ${ROS_AUTOMATIC_DISCOVERY_RANGE:-SUBNET} == SUBNET ]]; then
  export ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST
  [[ $- != *i* ]] || echo 'env.sh: ROS 2 on this machine only; across the network:  export ROS_AUTOMATIC_DISCOVERY_RANGE=SUBNET' >&2
fi
unset _il_root _il_prefix
