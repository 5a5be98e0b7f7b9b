"""How ``session.explain()`` is made: what the calls of one edit run as."""

from __future__ import annotations

from fisedit_compiler.inspect.explain import TEXT_TOKENS, explain_program
from fisedit_compiler.inspect.explanation import Explanation
from fisedit_compiler.inspect.facts import Setting
from fisedit_compiler.runtime.sessions.edit_session import EditSession


def explain_session(session: EditSession) -> Explanation:
    """Explain the calls of an edit, running or ended; see :meth:`EditSession.explain`."""
    measured, recording = session.measured(), session.recording
    if session.mask is None:
        return Explanation(note="no mask is set: calls run densely", measured=measured)
    if session.is_empty:
        return Explanation(note="the mask is empty: calls give the recorded outputs back", measured=measured)
    if session.fallback is not None:
        return Explanation(note=session.fallback, measured=measured)
    if session.plan is None or session.ran is None:
        area = session.mask.float().mean()
        return Explanation(note=f"{area:.1%} of the sites are in the mask; no call was made with it yet")
    executable, batch, element_size, device_type = session.ran
    size, calls = (recording.height, recording.width), recording.num_calls
    setting = Setting(*size, batch, TEXT_TOKENS, element_size, device_type, calls)
    return Explanation(
        (explain_program(executable, setting, session.plan, measured, session.reuse),), measured=measured
    )
