"""Try the first kernel as a card would: compiled by Triton, its launcher built in C by Triton's own builder.

Run by `test_triton_probe.py` in a process of its own. Prints what `try_kernel` says, then what a model would use.
"""

import logging
import sys
import sysconfig
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.build import compile_module_from_src

from moeflow.kernels.triton import probe
from moeflow.moe.choose_compute import can_use_triton

_SOURCE = """
#include <Python.h>
static PyObject *launch(PyObject *self, PyObject *address) {
    *(int *)PyLong_AsVoidPtr(address) += ADDED;
    Py_RETURN_NONE;
}
static PyMethodDef methods[] = {{"launch", launch, METH_O, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher", "", -1, methods};
PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&module); }
"""


class Launcher:
    """Built as a card's driver builds its own; adds a number where the kernel would."""

    added = 1

    def __init__(self, *_):
        source = _SOURCE.replace("ADDED", str(self.added))
        self._module = compile_module_from_src(src=source, name="launcher")

    def __call__(self, *arguments):
        self._module.launch(arguments[-1].data_ptr())


def main(case):
    """Try the kernel in a case that the test names; the environment may be broken by the test."""
    if case == "no Python.h":
        real = sysconfig.get_paths
        sysconfig.get_paths = lambda *a, **k: {**real(*a, **k), "include": "/nowhere"}
    if case == "wrong result":
        Launcher.added = 7
    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 101_376},
        load_binary=lambda *_: (None, None, 0, 0, 1024),
        unload_module=lambda _: None,
    )
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            get_current_target=lambda: GPUTarget("cuda", 89, 32),
            launcher_cls=Launcher,
            utils=utils,
        )
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    torch.cuda.is_available = lambda: True  # the card of this driver
    device = torch.device("cpu")
    print("reason:", probe.why_not(device))
    print("used:", [can_use_triton(device) for _ in range(2)])


if __name__ == "__main__":
    main(sys.argv[1])
