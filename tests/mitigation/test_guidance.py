import torch

from sd_guard.mitigation import DelayedGuidance, Subject


def test_delayed_guidance_keeps_the_prompt() -> None:
    embeds = torch.ones(3, 4)

    def unpaid(*_: object) -> list[float]:
        raise AssertionError("it costs no lanes to propose")

    subject = Subject("a dog", embeds, torch.zeros(3, 4), 0, unpaid, unpaid, lambda: 0)
    changes = list(DelayedGuidance(until=(0.1, 0.4)).propose(subject))
    assert [(change.strength, change.guidance_from, change.prompt) for change in changes] == [
        (0.1, 0.1, None),
        (0.4, 0.4, None),
    ]
    assert all(change.prompt_embeds is embeds for change in changes)
