"""Words to numbers: captions to tokens (`tokens`). What needs transformers imports it when it is called."""
