//! Who may use the page.
//!
//! The port has no authentication, and a browser that can reach it also shows foreign pages. So what they could do without asking is
//! refused. Everything of the page is shown only under an address or a known name, so that a foreign name that resolves to this machine
//! (DNS rebinding) is no way in. Prompts are taken only as JSON, for which a browser asks first and gets no permission, and only from the
//! page's own origin.

use std::net::IpAddr;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};

use super::{Port, playground::Refused};

/// Lets nobody through who came here under a foreign name.
pub(super) async fn known_name(State(port): State<Port>, request: Request, next: Next) -> Response {
    match check_host(request.headers(), &port.config.hosts) {
        Ok(()) => next.run(request).await,
        Err(refused) => refused.into_response(),
    }
}

fn check_host(headers: &HeaderMap, hosts: &[String]) -> Result<(), Refused> {
    let host = text(headers, header::HOST).unwrap_or_default();
    if known_host(host, hosts) {
        return Ok(());
    }
    let message = format!("'{}' is neither an address nor localhost: name it in --live-page-hosts", without_port(host));
    Err(Refused::new(StatusCode::FORBIDDEN, "host", message))
}

/// Refuses prompts that a foreign page could have sent, under whatever name.
pub(super) fn check_origin(headers: &HeaderMap) -> Result<(), Refused> {
    let host = text(headers, header::HOST).unwrap_or_default();
    let own = |origin: &str| ["http://", "https://"].iter().any(|scheme| origin.strip_prefix(scheme) == Some(host));
    if text(headers, header::ORIGIN).is_some_and(|origin| !own(origin)) {
        return Err(Refused::new(StatusCode::FORBIDDEN, "origin", "only the page of this server may send prompts"));
    }
    let kind = text(headers, header::CONTENT_TYPE).unwrap_or_default();
    if kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(Refused::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "content-type", "send application/json"))
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).map(|value| value.to_str().unwrap_or_default())
}

fn without_port(host: &str) -> &str {
    match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    }
}

/// An address, `localhost`, or one of `hosts`; with or without a port.
fn known_host(host: &str, hosts: &[String]) -> bool {
    let name = without_port(host);
    name.parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost") || hosts.iter().any(|known| known.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(headers: &[(&'static str, &str)]) -> Result<(), StatusCode> {
        let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect();
        let checked = check_host(&headers, &["gpu1.lan".into()]).and_then(|()| check_origin(&headers));
        checked.map_err(|refused| refused.status)
    }

    #[test]
    fn hosts_are_addresses_or_known_names() {
        let hosts = ["gpu1.lan".to_owned()];
        for known in ["127.0.0.1", "127.0.0.1:9464", "[::1]:9464", "[::1]", "localhost:9464", "LOCALHOST", "gpu1.lan:80", "10.1.2.3:1"] {
            assert!(known_host(known, &hosts), "{known}");
        }
        for foreign in ["", "evil.example", "evil.example:9464", "localhost.evil.example", "127.0.0.1.evil.example:9464", "[evil]:1"] {
            assert!(!known_host(foreign, &hosts), "{foreign}");
        }
    }

    #[test]
    fn what_a_foreign_page_could_send_is_refused() {
        let own = ("host", "127.0.0.1:9464");
        let json = ("content-type", "application/json; charset=utf-8");
        assert_eq!(status(&[own, json]), Ok(()), "no browser");
        assert_eq!(status(&[own, json, ("origin", "http://127.0.0.1:9464")]), Ok(()));
        assert_eq!(status(&[("host", "gpu1.lan"), json, ("origin", "https://gpu1.lan")]), Ok(()), "behind a proxy that speaks TLS");
        for origin in ["null", "http://evil.example", "http://127.0.0.1:9465", "127.0.0.1:9464"] {
            assert_eq!(status(&[own, json, ("origin", origin)]), Err(StatusCode::FORBIDDEN), "{origin}");
        }
        assert_eq!(status(&[("host", "evil.example"), json, ("origin", "http://evil.example")]), Err(StatusCode::FORBIDDEN), "rebinding");
        assert_eq!(status(&[json]), Err(StatusCode::FORBIDDEN));
        for kind in ["text/plain", "application/x-www-form-urlencoded", ""] {
            assert_eq!(status(&[own, ("content-type", kind)]), Err(StatusCode::UNSUPPORTED_MEDIA_TYPE), "{kind}");
        }
    }
}
