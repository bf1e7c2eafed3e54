"""How near do encoders and scans come to the references? The parity table of docs/encoders.md.

OMP_NUM_THREADS=1 python tests/encoder_tables.py            # runs the tests, writes the page
OMP_NUM_THREADS=1 python tests/encoder_tables.py --print    # prints the table instead
"""

import argparse
import sys

from golden_recorder import ROOT, Recorder, golden_table, run_tests
from marked_pages import put

PAGE = ROOT / "docs" / "encoders.md"
ENCODERS = ROOT / "tests" / "vlm" / "encoders"
TESTS = (
    f"{ENCODERS / 'test_selective_scan.py'}::test_golden",
    f"{ENCODERS / 'test_ssd.py'}::test_golden",
    f"{ENCODERS / 'test_vil.py'}::test_golden",
    ENCODERS / "test_vim_vmamba_golden.py",
    ENCODERS / "test_mambaout.py",
    ROOT / "tests" / "vlm" / "test_mamba_scan.py",
)

# Golden file -> what it is of.
PARTS = {
    "selective_scan_var": "`selective_scan`: B and C of each step, gate, bias",
    "selective_scan_group4_n1": "`selective_scan`: four groups, one state",
    "selective_scan_const": "`selective_scan`: B and C the same at all steps",
    "selective_scan_plain": "`selective_scan`: one step; no D, gate or bias",
    "selective_scan_nosoftplus": "`selective_scan`: steps as they come",
    "selective_scan_stress_large_delta": "`selective_scan`: steps up to 42",
    "mamba2_ssd_minimal": "`ssd_scan` (Mamba-2)",
    "mamba_block": "Mamba block, stepwise too",
    "vim_mixer_v2_div2": "Vim's mixer, both directions",
    "vim_mixer_v1": "Vim's mixer, one convolution for both",
    "vim_mixer_uni_layerscale": "Vim's mixer, one direction, layer scale",
    "vim_tiny_cfg": "Vim, class token in the middle",
    "vim_tiny_cfg_headcls": "Vim, class token first",
    "vim_tiny_cfg_doublecls": "Vim, a class token at each end",
    "vim_tiny_cfg_nocls_mean": "Vim, no class token",
    "vim_pos_embed_interp": "Vim's positions, resized the official way",
    "cross_scan_merge": "VMamba's four walks and back, all scan modes",
    "ss2d_v05_noz_r1": "VMamba's SS2D, v05 without gate",
    "ss2d_v05_z_chlast": "VMamba's SS2D, v05",
    "ss2d_v0": "VMamba's SS2D, v0",
    "vmamba_tiny_cfg": "VMamba v05 without gate",
    "vmamba_tiny_cfg_lnlast": "VMamba v05 without gate, channels last",
    "vmamba_v0_cfg": "VMamba v0",
    "mambaout": "MambaOut (timm's)",
    "mambaout_partial_conv": "MambaOut, half the channels convolved",
    "vil2_tiny_cfg": "ViL 2",
    "vil1_tiny_cfg_stride": "ViL 1, overlapping patches",
}


def main() -> int:
    """Run the tests and write the table; 1, and no table, if a test failed or is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--print", dest="only_print", action="store_true", help="leave the page")
    options = parser.parse_args()
    recorder = Recorder()
    if run_tests(recorder, TESTS, PARTS):
        return 1
    table = golden_table(recorder, PARTS, "part")
    if options.only_print:
        print(table)
    else:
        put(PAGE, {"golden": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
