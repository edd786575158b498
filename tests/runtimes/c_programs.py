"""Several packed programs as one, so that a single compilation covers them. Imports no torch."""

from dataclasses import replace

from micronet.packed.program import Program


def merged(programs):
    """Return a program whose outputs are those of all given ones, which take images of the same shape."""
    operations, outputs = [], []
    for program in programs:
        before = len(operations)
        for each in program.operations:
            operations.append(replace(each, inputs=[number + before if number else 0 for number in each.inputs]))
        outputs += [number + before if number else 0 for number in program.results]
    return Program(operations, programs[0].shape, {}, outputs)
