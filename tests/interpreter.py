"""Triton's interpreter in less than half of its time, which was half of the suite's."""

from __future__ import annotations

import dataclasses

from triton.runtime import interpreter


def quicken() -> None:
    """Leaves out what the interpreter does for nothing; one that has no such parts is left as it is."""
    for part in (_patch_once_a_launch, _compute_no_unread_checks, _look_types_up_once, _make_types_once):
        part()


def _patch_once_a_launch() -> None:
    """Each call of a device function, `tl.sum` among them, lays the interpreter's operators over the language anew, by
    a walk through all its names. What has been laid over stays until the launch ends: once for each module is enough.
    """
    patch, executor = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "GridExecutor", None)
    if patch is None or executor is None:
        return
    launch, done = executor.__call__, set()

    def once(fn):
        module = id(fn.__globals__)
        if module not in done:
            done.add(module)
            return patch(fn)

    def begin(self, *args, **kwargs):
        done.clear()  # a launch asks first, before any function it calls, and undoes what it was given at its end
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, executor.__call__ = once, begin


def _compute_no_unread_checks() -> None:
    """Every sum and product of integers is computed again in 64 bits, and compared: for an assertion that is made where
    `debug` is on only. Measured: 45 % of a scan's time."""
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _look_types_up_once() -> None:
    """NumPy's type of a Triton type is looked up in a table that each look-up builds."""
    find = getattr(interpreter, "_get_np_dtype", None)
    if find is None:
        return
    found = {}

    def once(dtype):
        scalar = dtype.scalar
        if scalar.name not in found:
            found[scalar.name] = find(scalar)
        return found[scalar.name]

    interpreter._get_np_dtype = once


def _make_types_once() -> None:
    """Each value makes its type anew, with its name as text and its shape as a tuple of constants: as much work as the
    operation itself. Of a type and of a value, all but the handle follow from element type and shape."""
    core = interpreter.tl.core
    make_type, make_value = core.block_type.__init__, core.tensor.__init__
    types = {}

    def typed(self, element_ty, shape):
        space = getattr(element_ty, "address_space", None)  # a pointer's name does not say it
        key = (element_ty.name, space, *(s.value if isinstance(s, core.constexpr) else s for s in shape))
        if key in types:
            self.__dict__ = types[key]
        else:
            make_type(self, element_ty, shape)
            types[key] = self.__dict__

    def valued(self, handle, type):
        made = type.__dict__.get("_made")
        if made is None:
            make_value(self, handle, type)
            type._made = dict(self.__dict__)
        else:
            self.__dict__.update(made, handle=handle)

    core.block_type.__init__, core.tensor.__init__ = typed, valued
