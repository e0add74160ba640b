#!/usr/bin/env bash
# Looks for what pip cannot install: Python 3.11, Java 17, g++ and CMake < 4.
# Prints the path of Python and exits 0, or says which packages to install and exits 1.
# PYTHON, JAVA_HOME, CXX and HOROVOD_CMAKE name others than the first on the PATH.
set -u

missing=() debian=() fedora=() conda=() notes=()

lacks() { # what, what was found, Debian packages, Fedora packages, conda package
    missing+=("$(printf '  %-12s %s' "$1" "$2")")
    debian+=("$3") fedora+=("$4") conda+=("$5")
}

python=
for name in "${PYTHON:-}" python3.11 python3 python; do
    [ -n "$name" ] || continue
    version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' </dev/null 2>/dev/null) || continue
    [ "$version" = 3.11 ] && python=$(command -v "$name") && break
    seen=${seen:-found $version}
done
if [ -z "$python" ]; then
    lacks "Python 3.11" "${seen:-found none}" "python3.11 python3.11-venv python3.11-dev" "python3.11 python3.11-devel" "python=3.11"
else
    if ! "$python" -c 'import ensurepip, venv' </dev/null 2>/dev/null; then
        lacks "Python 3.11" "found without its venv module" "python3.11-venv" "python3.11" "python=3.11"
    fi
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))' </dev/null)/Python.h
    if [ ! -f "$header" ]; then
        lacks "Python 3.11" "found without its C headers" "python3.11-dev" "python3.11-devel" "python=3.11"
    fi
fi

java=java
[ -n "${JAVA_HOME:-}" ] && java=$JAVA_HOME/bin/java # as Spark chooses
if version=$("$java" -version 2>&1 </dev/null); then
    version=$(printf '%s\n' "$version" | sed -n 's/.* version "\([^"]*\)".*/\1/p' | head -n 1)
    found="found ${version:-another}${JAVA_HOME:+ in JAVA_HOME}"
else
    version= found="found none${JAVA_HOME:+ in JAVA_HOME}"
fi
if [ "${version%%.*}" != 17 ]; then
    lacks "Java 17" "$found" "openjdk-17-jre-headless" "java-17-openjdk-headless" "openjdk=17"
    notes+=("Java 17 may stand beside other Javas: set JAVA_HOME to its folder.")
fi

if ! "${CXX:-g++}" -std=gnu++17 -fsyntax-only -x c++ /dev/null </dev/null >/dev/null 2>&1; then
    found="found none"
    command -v "${CXX:-g++}" >/dev/null && found="found one without C++17"
    lacks "g++" "$found" "g++" "gcc-c++" "gxx"
fi

cmake=${HOROVOD_CMAKE:-cmake}
version=$("$cmake" --version 2>/dev/null </dev/null | sed -n 's/^cmake version \([0-9.]*\).*/\1/p')
if [ -z "$version" ] || [ "${version%%.*}" -ge 4 ]; then
    lacks "CMake < 4" "found ${version:-none}" "cmake" "cmake" "'cmake<4'"
    notes+=("Where the packaged CMake is 4 or later: pip install 'cmake<4', anywhere, and put it first on the PATH or set HOROVOD_CMAKE to it.")
fi

if [ ${#missing[@]} -gt 0 ]; then
    {
        echo "sparkmed needs programs that this machine does not have:"
        printf '%s\n' "${missing[@]}"
        echo "Install them with one of:"
        echo "  Debian, Ubuntu   apt-get install ${debian[*]}"
        echo "  Fedora, RHEL     dnf install ${fedora[*]}"
        echo "  conda            conda install -c conda-forge ${conda[*]}"
        [ ${#notes[@]} -eq 0 ] || printf '%s\n' "${notes[@]}"
    } >&2
    exit 1
fi
printf '%s\n' "$python"
