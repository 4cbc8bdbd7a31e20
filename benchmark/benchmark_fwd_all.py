"""Forward pass over lengths 2^1 .. 2^17: naive flip, bidirectional, causal (Bi-Mamba2's names and shape by default).

python benchmark/benchmark_fwd_all.py
python benchmark/benchmark_fwd_all.py --batch 8 --heads 24 --headdim 64 --dstate 64 --dtype bf16 \\
        --longest 14 --name _base
python benchmark/benchmark_fwd_all.py --device cpu --longest 10        # the PyTorch path
"""

from scans import over_lengths

if __name__ == "__main__":
    over_lengths(__doc__, backward=False, name="fwd_all")
