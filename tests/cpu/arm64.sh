#!/bin/bash
# Runs tests of the native CPU backend on 64-bit ARM, emulated:
#   tests/cpu/arm64.sh tests/cpu/test_gemm.py -k neon
# Whatever follows goes to pytest. QEMU_CPU names the processor (default max; cortex-a72 has no dot product,
# neoverse-n1 has that of bytes only), CC the compiler. On Debian or Ubuntu with qemu-user,
# gcc-aarch64-linux-gnu, and cython in the environment's Python; installs nothing, all it gets and builds is
# in build/arm64. Emulation takes some twenty times as long: choose tests.
set -e
cd "$(dirname "$0")/../.."
here=$PWD/build/arm64
root=$here/root site=$here/site package=$here/package/asyncengine
mkdir -p "$here/lists/partial" "$here/archives/partial" "$package/_fast"

if [ ! -e "$here/complete" ]; then
    touch "$here/status"
    cat >"$here/apt.conf" <<END
APT { Architecture "arm64"; Architectures { "arm64"; }; Sandbox::User "root"; };
Dir { State "$here"; State::status "$here/status"; Cache "$here"; };
END
    export APT_CONFIG=$here/apt.conf
    apt-get update
    apt-get install --download-only -y --no-install-recommends python3 libpython3-dev libstdc++6
    for deb in "$here"/archives/*.deb; do dpkg -x "$deb" "$root"; done
    version=$(ls "$root/usr/include" | sed -n 's/^python//p')
    python -m pip install --target "$site" --only-binary=:all: --python-version "$version" \
        --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 \
        numpy pytest pytest-timeout hypothesis gguf msgspec typing_extensions
    touch "$here/complete"
fi

python=$(ls "$root"/usr/bin/python3.[0-9]* | head -1)
include=$root/usr/include/$(basename "$python")
tag=cpython-$(basename "$python" | tr -cd 0-9)-aarch64-linux-gnu
ln -sfn "$PWD"/asyncengine/* "$package/"
ln -sfn "$PWD"/_fast/*.py "$package/_fast/"
for name in cpu ring slots; do
    cython -3 -X boundscheck=False -X wraparound=False -X cdivision=True -X initializedcheck=False \
        "_fast/$name.pyx" -o "$here/$name.c"
    # shellcheck disable=SC2046
    ${CC:-aarch64-linux-gnu-gcc} -shared -fPIC -O3 -std=gnu11 -fno-math-errno -Wall \
        -I"$include" -I"$root/usr/include" -I_fast "$here/$name.c" \
        $(find "_fast/$name" -name '*.c' | sort) -o "$package/_fast/$name.$tag.so" -lm -lpthread
done

export PYTHONPATH=$here/package:$site PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1
exec qemu-aarch64 -cpu "${QEMU_CPU:-max}" -L "$root" "$python" -m pytest -q -p no:cacheprovider "$@"
