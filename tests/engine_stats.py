"""What an engine might report of itself, for tests of what shows it."""

from gptoss_launch.parallel.engine.wire import Stats

STATS = Stats(
    running=3,
    waiting=4,
    kv_pages=200,
    kv_pages_used=50,
    prefix_queried_tokens_total=1000,
    prefix_hit_tokens_total=600,
    preemptions_total=7,
    exact_draws_total=8,
    steps_total=90,
    prefill_tokens_total=400,
    decode_tokens_total=70,
    expert_hits_total=30,
    expert_misses_total=10,
    expert_moved_bytes_total=5000,
    expert_waited_s_total=0.5,
    expert_stalled_s_total=0.25,
    expert_ahead_total=12,
    expert_ahead_hits_total=9,
    decode_step_s=0.02,
    communication_s=0.005,
    slow_paths=("sampling: on the host",),
)
