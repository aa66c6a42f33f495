"""python -m lora_lite_func"""

from .commands import main

if __name__ == "__main__":
    raise SystemExit(main())
