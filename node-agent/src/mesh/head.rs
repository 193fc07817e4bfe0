//! Heads of requests and answers: HTTP/1.1, as little of it as chunks need.
//!
//! # Invariants
//!
//! - Every body has a length that its head says, in one way only: what could be read in two ways is refused.

use tierkeep::peers::Ticket;

/// Ours have two or three.
const HEADERS_MAX: usize = 32;

/// A refusal's words may be so long.
const WORDS_BYTES_MAX: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Method {
    /// A chunk is wanted.
    Get,
    /// A chunk comes.
    Put,
}

/// What somebody asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: Method,
    /// `None`: nothing is there under this path.
    pub(super) chunk: Option<(Ticket, usize)>,
    /// Bytes that follow.
    pub(super) length: u64,
    /// Nothing follows these.
    pub(super) last: bool,
}

impl Request {
    /// # Errors
    /// It is none of these, in words.
    pub(super) fn parse(head: &[u8]) -> Result<Self, String> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut parsed = httparse::Request::new(&mut headers);
        whole(parsed.parse(head))?;
        let method = match parsed.method {
            Some("GET") => Method::Get,
            Some("PUT") => Method::Put,
            other => return Err(format!("{:?} is not done here", other.unwrap_or(""))),
        };
        let length = length(parsed.headers)?;
        let last = parsed.version == Some(0)
            || parsed
                .headers
                .iter()
                .any(|h| named(h, "connection") && h.value.eq_ignore_ascii_case(b"close"));
        let chunk = parsed.path.and_then(chunk_of);
        Ok(Self { method, chunk, length: length.unwrap_or(0), last })
    }
}

pub(super) fn request(method: Method, ticket: &Ticket, chunk: usize, length: u64) -> String {
    let method = match method {
        Method::Get => "GET",
        Method::Put => "PUT",
    };
    let ticket: String = ticket.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "{method} /chunks/{ticket}/{chunk} HTTP/1.1\r\nhost: tierkeep\r\ncontent-length: {length}\r\n\r\n"
    )
}

/// What is answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// Bytes that follow.
    pub(super) length: u64,
}

impl Answer {
    /// # Errors
    /// It is none, in words.
    pub(super) fn parse(head: &[u8]) -> Result<Self, String> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut parsed = httparse::Response::new(&mut headers);
        whole(parsed.parse(head))?;
        let status = parsed.code.unwrap_or(0);
        let length = match length(parsed.headers)? {
            Some(length) => length,
            None if status == 204 => 0,
            None => return Err("its answer has no end".into()),
        };
        if status != 200 && length > WORDS_BYTES_MAX {
            return Err(format!("it answers {status} with {length} bytes"));
        }
        Ok(Self { status, length })
    }
}

pub(super) fn answer(status: u16, length: u64) -> String {
    let reason = match status {
        200 => "OK",
        204 => return "HTTP/1.1 204 No Content\r\n\r\n".into(),
        400 => "Bad Request",
        404 => "Not Found",
        409 => "Conflict",
        413 => "Content Too Large",
        422 => "Unprocessable Content",
        _ => "Internal Server Error",
    };
    format!("HTTP/1.1 {status} {reason}\r\ncontent-length: {length}\r\n\r\n")
}

fn whole(parsed: httparse::Result<usize>) -> Result<(), String> {
    match parsed {
        Ok(httparse::Status::Complete(_)) => Ok(()),
        Ok(httparse::Status::Partial) => Err("its head was cut off".into()),
        Err(e) => Err(format!("it speaks no HTTP: {e}")),
    }
}

fn named(header: &httparse::Header<'_>, name: &str) -> bool {
    header.name.eq_ignore_ascii_case(name)
}

fn length(headers: &[httparse::Header<'_>]) -> Result<Option<u64>, String> {
    if headers.iter().any(|h| named(h, "transfer-encoding")) {
        return Err("chunks come whole, not in an encoding".into());
    }
    let mut all = headers.iter().filter(|h| named(h, "content-length"));
    let Some(one) = all.next() else { return Ok(None) };
    let digits = |text: &[u8]| !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(one.value).ok().filter(|_| digits(one.value));
    match text.and_then(|text| text.parse().ok()) {
        Some(length) if all.next().is_none() => Ok(Some(length)),
        _ => Err("its length is none".into()),
    }
}

/// `/chunks/TICKET/NUMBER`.
fn chunk_of(path: &str) -> Option<(Ticket, usize)> {
    let (hex, number) = path.strip_prefix("/chunks/")?.split_once('/')?;
    if hex.len() != 32
        || !hex.bytes().all(|b| b.is_ascii_hexdigit())
        || !number.bytes().all(|b| b.is_ascii_digit())
    {
        return None;
    }
    let mut ticket = [0; 16];
    for (index, byte) in ticket.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * index..2 * index + 2], 16).ok()?;
    }
    Some((ticket, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICKET: Ticket = [0xa5; 16];

    #[test]
    fn what_is_written_is_read() {
        for (method, length) in [(Method::Get, 0), (Method::Put, 4 << 20)] {
            let head = request(method, &TICKET, 7, length);
            let read = Request { method, chunk: Some((TICKET, 7)), length, last: false };
            assert_eq!(Request::parse(head.as_bytes()), Ok(read));
        }
        for (status, length) in [(200, 1 << 30), (204, 0), (404, 12), (422, 0)] {
            let head = answer(status, length);
            assert_eq!(Answer::parse(head.as_bytes()), Ok(Answer { status, length }));
        }
    }

    #[test]
    fn a_head_cut_anywhere_is_refused() {
        let (asked, answered) = (request(Method::Put, &TICKET, 7, 9), answer(404, 5));
        for cut in 0..asked.len() {
            assert!(Request::parse(&asked.as_bytes()[..cut]).is_err(), "{cut}");
        }
        for cut in 0..answered.len() {
            assert!(Answer::parse(&answered.as_bytes()[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let path = "/chunks/00000000000000000000000000000000/1";
        for bad in [
            "content-length: 5\r\ncontent-length: 5\r\n",
            "content-length: +5\r\n",
            "content-length: 5, 5\r\n",
            "content-length: -1\r\n",
            "content-length: 99999999999999999999999\r\n",
            "transfer-encoding: chunked\r\n",
            "Transfer-Encoding: identity\r\ncontent-length: 5\r\n",
        ] {
            let head = format!("PUT {path} HTTP/1.1\r\n{bad}\r\n");
            assert!(Request::parse(head.as_bytes()).is_err(), "{bad:?}");
            let head = format!("HTTP/1.1 200 OK\r\n{bad}\r\n");
            assert!(Answer::parse(head.as_bytes()).is_err(), "{bad:?}");
        }
        assert!(Answer::parse(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
        assert!(Answer::parse(b"HTTP/1.1 404 No\r\ncontent-length: 5000\r\n\r\n").is_err());
    }

    #[test]
    fn a_path_that_is_no_chunk_leads_nowhere() {
        for path in [
            "/",
            "/chunks/",
            "/chunks/00/1",
            "/chunks/0000000000000000000000000000000g/1",
            "/chunks/+0000000000000000000000000000000/1",
            "/chunks/00000000000000000000000000000000/",
            "/chunks/00000000000000000000000000000000/-1",
            "/chunks/00000000000000000000000000000000/1/2",
            "/chunks/00000000000000000000000000000000/99999999999999999999999",
            "/chunks/../../../../../../etc/passwd",
        ] {
            let head = format!("GET {path} HTTP/1.1\r\n\r\n");
            let request = Request::parse(head.as_bytes()).unwrap();
            assert_eq!(request.chunk, None, "{path}");
        }
    }
}
