from tiny import subject_of

from sd_guard.mitigation import DelayedGuidance


def test_delayed_guidance_keeps_the_prompt() -> None:
    subject = subject_of()
    changes = list(DelayedGuidance(until=(0.1, 0.4)).propose(subject))
    assert [(change.strength, change.guidance_from, change.prompt) for change in changes] == [
        (0.1, 0.1, None),
        (0.4, 0.4, None),
    ]
    assert all(change.prompt_embeds is subject.prompt_embeds for change in changes)
