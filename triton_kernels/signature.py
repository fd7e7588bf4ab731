"""What Triton compiles for a launch: its types, its constants, and what it assumes of the numbers."""

import torch
from triton.compiler import ASTSource

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def describe(launch):
    """(signature, constants, attributes) of a launch, as Triton finds them for pointers that 16 divides."""
    signature, constants, attributes = {}, {}, {}

    def visit(path, value, specialize, align):
        if isinstance(value, tuple):
            return tuple(visit((*path, i), item, specialize, align) for i, item in enumerate(value))
        is_number = not isinstance(value, torch.Tensor)
        if value is None or (specialize and is_number and value == 1):
            constants[path] = value
            return "constexpr"
        if specialize and value % 16 == 0 if is_number else align:
            attributes[path] = [["tt.divisibility", 16]]
        if is_number:
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        return _TYPES[value.dtype]

    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            align = not parameter.do_not_specialize_on_alignment
            signature[parameter.name] = visit((i,), value, not parameter.do_not_specialize, align)
    return signature, constants, attributes


def source(launch):
    """The source that `triton.compile` takes."""
    return ASTSource(launch.kernel, *describe(launch))


def key(launch):
    """What tells the compiled kernels of launches apart: launches with one key share one."""
    signature, constants, attributes = describe(launch)
    return (
        launch.kernel.__name__,
        str(signature),
        str(sorted(constants.items())),
        str(sorted(attributes)),
        launch.config,
    )
