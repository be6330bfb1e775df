"""Counting the machine code of the CUDA kernels: the interpreter by hand, and the kernels within their budgets."""

import shutil

import numpy as np
import pytest

from bench import instructions
from bench.sass import GLOBAL, Cluster, Program
from bench.toolkit import tool

LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   IMAD.MOV.U32 R1, RZ, RZ, 0x3f800000 ;
        /*0020*/                   LOP3.LUT R2, R0, 0x3, RZ, 0xc0, !PT ;
        /*0030*/                   BSSY B0, `(.L_x_1) ;
.L_x_0:
        /*0040*/                   ISETP.NE.AND P0, PT, R2, RZ, PT ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/                   FADD R1, R1, R1 ;
        /*0070*/                   VIADD R2, R2, 0xffffffff ;
        /*0080*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0090*/                   BSYNC B0 ;
        /*00a0*/                   SHFL.BFLY PT, R3, R1, 0x1, 0x1f ;
        /*00b0*/                   FFMA R1, R3, 10, R1 ;
        /*00c0*/                   IMAD.SHL.U32 R4, R0, 0x4, RZ ;
        /*00d0*/                   STS [R4+0x400], R1 ;
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00f0*/                   LOP3.LUT R5, R4, 0xfc, RZ, 0x3c, !PT ;
        /*0100*/                   LDS R6, [R5+0x400] ;
        /*0110*/                   IADD3 R8, P1, R4, c[0x0][0x210], RZ ;
        /*0120*/                   IADD3.X R9, RZ, c[0x0][0x214], RZ, P1, !PT ;
        /*0130*/                   STG.E desc[UR4][R8.64], R6 ;
        /*0140*/                   EXIT ;
"""


def test_a_listing_runs_as_written():
    # threads go round the loop 0 to 3 times and meet again; then neighbours, then the other end of the CTA
    memory = np.zeros(64 * 4, np.uint8)
    issued = Cluster(Program(LISTING), 1, 64, memory, int(GLOBAL).to_bytes(8, "little")).run()
    powers = 2.0 ** (np.arange(64) % 4)
    mixed = powers + 10 * powers[np.arange(64) ^ 1]
    np.testing.assert_array_equal(memory.view(np.float32), mixed[::-1])
    # of two warps: the head of the loop four times, its body three times, all else once
    assert issued.tolist() == [2] * 4 + [8, 8, 6, 6, 6] + [2] * 12


def test_an_instruction_that_is_not_known_is_an_error():
    program = Program("        /*0000*/                   FROB R0, R1 ;\n")
    with pytest.raises(NotImplementedError, match="FROB R0, R1"):
        Cluster(program, 1, 32, np.zeros(4, np.uint8), b"").run()


def test_threads_that_wait_for_each_other_are_a_deadlock():
    listing = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   ISETP.GE.AND P0, PT, R0, 0x10, PT ;
        /*0020*/                   BSSY B1, `(.L_x_0) ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_0:
        /*0050*/                   BSYNC B1 ;
        /*0060*/                   EXIT ;
"""
    with pytest.raises(RuntimeError, match="deadlock: 32 threads wait"):
        Cluster(Program(listing), 1, 32, np.zeros(4, np.uint8), b"").run()


@pytest.mark.parametrize(("k", "ranks", "template"), [(49, 1, "false, 2"), (196, 4, "true, 7"), (784, 16, "true, 25")])
def test_layouts_are_those_of_the_launches(k, ranks, template):
    assert instructions.layout_of(k, ranks).template == template
    with pytest.raises(ValueError, match="no resident plan"):
        instructions.layout_of(801, 16)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(shutil.which(tool(name)) for name in ("nvcc", "nvdisasm")), reason="needs nvcc and nvdisasm"
)
@pytest.mark.parametrize(
    ("k", "noise", "forward", "backward"), [(49, 1.0, 7.5, 7.2), (196, 0.0, 4.3, 3.7), (784, 0.0, 2.0, 2.6)]
)
def test_kernels_stay_within_their_budgets(k, noise, forward, backward):
    # every count comes with the masks and gradients that the machine code has computed, compared with float64
    found = instructions.counts(
        instructions.layout_of(k, instructions.RANKS[k]), instructions.Case(k, 30, noise=noise), checked=True
    )
    assert found["forward"]["per_useful_fma"] <= forward
    assert found["backward"]["per_useful_fma"] <= backward
    if k == 784:
        assert found["backward"]["per_useful_fma_sweep"] <= backward
        assert found["forward"]["readout_share"] <= 0.1
