"""python -m benchmarks.examples.causal"""

from .program import main

if __name__ == "__main__":
    raise SystemExit(main())
