"""Encode all problems: python jobs/encode.py --config configs/X.yaml llama.encodings=true ...

Training and evaluation with llama.encodings=true then read them. Run it again to resume.
"""

from hybrid.cli import main
from hybrid.cluster import encode

if __name__ == "__main__":
    main(__doc__, lambda config: print(encode(config)))
