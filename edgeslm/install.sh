
# Installs this wheelhouse on a device, with no network:  sh install.sh [DIRECTORY]
# DIRECTORY: the virtual environment to make, ~/edgeslm/venv if not given.  PYTHON=...: another interpreter.
# Whatever does not fit is refused with exit code 2 before anything is installed.

set -eu

refuse() {
  printf 'error: %s\n' "$1" >&2
  [ -z "${2-}" ] || printf '  try: %s\n' "$2" >&2
  exit 2
}

again="on the workstation: edgeslm wheelhouse"
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-$HOME/edgeslm/venv}
python=${PYTHON:-python3}

[ "$(uname -s)" = Linux ] || refuse "these wheels are for Linux, and this is $(uname -s)"
[ "$(uname -m)" = aarch64 ] || refuse "these wheels are for aarch64, and this is $(uname -m)" \
  "a 64-bit edition of the system"
command -v "$python" >/dev/null || refuse "$python is not here" "sudo apt install python3"

# the kernel's own word on the instruction sets, of which Features in /proc/cpuinfo is a copy (an emulator may show the
# host's file); bits: Linux arch/arm64/include/uapi/asm/hwcap.h
facts=$("$python" -c '
import ctypes, os, struct, sys
library = ctypes.CDLL(None)
library.getauxval.restype, library.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
one, two = library.getauxval(16), library.getauxval(26)
bits = {"asimd": one >> 1, "asimdhp": one >> 10, "asimddp": one >> 20, "sve": one >> 22,
        "sve2": two >> 1, "i8mm": two >> 13, "bf16": two >> 14}
glibc = os.confstr("CS_GNU_LIBC_VERSION") or "none 0.0"
print("%d.%d" % sys.version_info[:2], struct.calcsize("P") * 8, glibc.split()[1], *[n for n in bits if bits[n] & 1])
') || refuse "$python can't tell what this system is"
set -- $facts
version=$1 bits=$2 glibc=$3
shift 3
features=$*

[ "$bits" = 64 ] || refuse "$python is a $bits-bit program" "a 64-bit edition of the system"
[ "$version" = "$wanted_python" ] || refuse "these wheels are for Python $wanted_python, and $python is $version" \
  "$again --for $profile --python $version, or PYTHON=python$wanted_python"
case $glibc in
  2.*) [ "${glibc#2.}" -ge "$wanted_glibc" ] || refuse "these wheels need glibc 2.$wanted_glibc, and here is $glibc" \
    "a newer edition of the system" ;;
  *) refuse "these wheels need glibc 2.$wanted_glibc, which this system has not" ;;
esac
for feature in $wanted_features; do
  case " $features " in
    *" $feature "*) ;;
    *) refuse "these wheels are for $profile; this processor lacks $feature (it has: $features)" \
      "$again --for the profile of this device (linux-aarch64 runs on all)" ;;
  esac
done

checked=$(cd "$here" && sha256sum -c SHA256SUMS 2>&1) || refuse \
  "not as they were made: $(printf '%s\n' "$checked" | grep -v ': OK$')" "copy the wheelhouse again"

"$python" -m venv --without-pip "$target"
for pip in "$here"/pip-*.whl; do :; done
"$target/bin/python3" "$pip/pip" install --no-index --find-links "$here" --no-cache-dir --force-reinstall \
  --disable-pip-version-check --quiet pip "$requirement"
cp "$here/wheelhouse.json" "$target/wheelhouse.json"
echo "installed in $target; to look whether all is well: $target/bin/edgeslm doctor"
