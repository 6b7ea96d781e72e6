//! The caller's trace, as metadata carry it: `traceparent` and `tracestate` of the W3C recommendation Trace Context.

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

/// Longest `tracestate` that is kept, in bytes: what the recommendation asks for. It is written into every span.
const MAX_TRACE_STATE: usize = 512;

/// The caller's span; `None` if `traceparent` is not well formed. A `tracestate` that is not is left out.
pub(super) fn parent(traceparent: &str, tracestate: &str) -> Option<SpanContext> {
    let mut fields = traceparent.trim().split('-');
    let mut hex = |digits| fields.next().filter(|field| field.len() == digits && field.bytes().all(is_lower_hex));
    let (version, trace, span, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    // Versions to come may have more fields; ff will never be one.
    if version == "ff" || (version == "00" && fields.next().is_some()) {
        return None;
    }
    let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
    let sampled = u8::from_str_radix(flags, 16).ok()? & TraceFlags::SAMPLED.to_u8() != 0;
    let flags = TraceFlags::default().with_sampled(sampled);
    let context = SpanContext::new(trace, span, flags, true, state(tracestate).unwrap_or_default());
    // Neither id may be zero.
    context.is_valid().then_some(context)
}

fn is_lower_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

fn state(text: &str) -> Option<TraceState> {
    if text.len() > MAX_TRACE_STATE {
        return None;
    }
    let members = text.split(',').map(str::trim).filter(|member| !member.is_empty());
    let pairs: Vec<_> = members.map(|member| member.split_once('=')).collect::<Option<_>>()?;
    TraceState::from_key_value(pairs).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SPAN: &str = "00f067aa0ba902b7";

    #[test]
    fn well_formed_parents_are_read() {
        let read = |text: &str| parent(text, "").unwrap();
        let context = read(&format!("00-{TRACE}-{SPAN}-01"));
        assert_eq!((context.trace_id().to_string(), context.span_id().to_string()), (TRACE.into(), SPAN.into()));
        assert!(context.is_sampled() && context.is_remote());
        assert!(!read(&format!("00-{TRACE}-{SPAN}-00")).is_sampled());
        // The random flag beside the sampled one; a version to come, with a field more.
        assert!(read(&format!("00-{TRACE}-{SPAN}-03")).is_sampled());
        assert!(!read(&format!("00-{TRACE}-{SPAN}-02")).is_sampled());
        assert!(read(&format!("42-{TRACE}-{SPAN}-01-more")).is_sampled());
    }

    #[test]
    fn malformed_parents_are_none() {
        let (zeros, long) = ("0".repeat(32), "a".repeat(1 << 16));
        let malformed = [
            String::new(),
            "-".into(),
            "---".into(),
            long,
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{TRACE}-{SPAN}-01-"),
            format!("00-{TRACE}-{SPAN}-01-more"),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("0-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{}-{SPAN}-01", &TRACE[1..]),
            format!("00-+{}-{SPAN}-01", &TRACE[1..]),
            format!("00-{zeros}-{SPAN}-01"),
            format!("00-{TRACE}-{}-01", &zeros[..16]),
            format!("00-{TRACE}-{SPAN}-0"),
            format!("00-{TRACE}-{SPAN}-+1"),
            format!("00-{TRACE}-{SPAN}-é"),
        ];
        for text in malformed {
            assert_eq!(parent(&text, ""), None, "{text}");
        }
    }

    #[test]
    fn a_state_is_kept_if_it_is_one() {
        let state = |text: &str| parent(&format!("00-{TRACE}-{SPAN}-01"), text).unwrap().trace_state().header();
        assert_eq!(state("a=1,b@c=2"), "a=1,b@c=2");
        assert_eq!(state(" a=1 , b=2 ,"), "a=1,b=2");
        for text in ["", "a", "A=1", &format!("a={}", "x".repeat(600))] {
            let kept = state(text);
            assert!(kept.is_empty(), "{text}: {kept}");
        }
    }
}
