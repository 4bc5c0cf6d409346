"""Fill the prompt cache: python jobs/cache_prompts.py --config C llama.prompt_cache=true ...

Training and evaluation with llama.prompt_cache=true read the cache. Run again to resume.
"""

from hybrid.cli import main
from hybrid.launch import cache_prompts

if __name__ == "__main__":
    main(__doc__, lambda config: print(cache_prompts(config)))
