//! Something between a client and a server that does to a request what networks and busy servers do.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    time::Duration,
};

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It goes through.
    Passes,
    /// The server never sees it; the answer is this status, with this code in it.
    Refused(u16, &'static str),
    /// The connection is reset in the middle of its body.
    Reset,
    /// The server does it, and its answer is lost.
    AnswerLost,
    /// The answer's body breaks off in the middle.
    AnswerCut,
    /// One bit of its body is another when it arrives.
    Flipped,
    /// It waits before it goes through.
    Late(Duration),
    /// It goes through, and its answer has an ETag, which a double of a server forgot.
    Tagged,
}

/// A request as the proxy sees it.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) target: String,
    /// Its headers, as they came.
    pub(crate) head: String,
    /// How many came before it.
    pub(crate) number: usize,
}

impl Request {
    /// One part of an upload in parts.
    pub(crate) fn is_part(&self) -> bool {
        self.method == "PUT" && self.target.contains("partNumber=")
    }

    /// Which part it is, if it is one.
    pub(crate) fn part_number(&self) -> Option<u32> {
        let (_, rest) = self.target.split_once("partNumber=").filter(|_| self.is_part())?;
        rest.split('&').next()?.parse().ok()
    }

    /// Whether it was signed with this key, in a header or in its URL.
    pub(crate) fn is_signed_by(&self, key: &str) -> bool {
        let (url, header) = (format!("X-Amz-Credential={key}%2F"), format!("Credential={key}/"));
        self.target.contains(&url) || self.head.contains(&header)
    }

    /// Whether it is to be done only where nothing has its name.
    pub(crate) fn is_conditional(&self) -> bool {
        self.head.to_ascii_lowercase().contains("if-none-match:")
    }

    /// Without headers that begin so.
    pub(crate) fn strip(&mut self, names: &[&str]) {
        let stays = |line: &&str| {
            let line = line.to_ascii_lowercase();
            !names.iter().any(|name| line.starts_with(name))
        };
        self.head = self.head.split_inclusive("\r\n").filter(stays).collect();
    }

    /// The end of one.
    pub(crate) fn is_complete(&self) -> bool {
        self.method == "POST" && self.target.contains("uploadId=")
    }

    /// The beginning of one.
    pub(crate) fn is_begin(&self) -> bool {
        self.method == "POST" && self.target.contains("uploads=")
    }
}

type Plan = dyn Fn(&mut Request) -> Fate + Send + Sync;
/// What becomes of an answer that goes through.
type Change = dyn Fn(&Request, Vec<u8>) -> Vec<u8> + Send + Sync;

/// A proxy that listens; what it has seen is kept.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Proxy {
    /// In front of the server at `upstream`. Its threads end with the process.
    pub(crate) fn start(
        upstream: u16,
        plan: impl Fn(&Request) -> Fate + Send + Sync + 'static,
    ) -> Self {
        Self::rewriting(upstream, move |request| plan(request))
    }

    /// The same where the plan may change what is asked for.
    pub(crate) fn rewriting(
        upstream: u16,
        plan: impl Fn(&mut Request) -> Fate + Send + Sync + 'static,
    ) -> Self {
        Self::changing(upstream, plan, |_, answer| answer)
    }

    /// The same where answers may be changed, too.
    pub(crate) fn changing(
        upstream: u16,
        plan: impl Fn(&mut Request) -> Fate + Send + Sync + 'static,
        change: impl Fn(&Request, Vec<u8>) -> Vec<u8> + Send + Sync + 'static,
    ) -> Self {
        let change: Arc<Change> = Arc::new(change);
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = listener.local_addr().expect("address").port();
        let seen = Arc::<Mutex<Vec<Request>>>::default();
        let (plan, list): (Arc<Plan>, _) = (Arc::new(plan), seen.clone());
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (plan, change, list) = (plan.clone(), change.clone(), list.clone());
                // A client that goes away in the middle is what this is for.
                std::thread::spawn(move || serve(client, upstream, (&*plan, &*change), &list).ok());
            }
        });
        Self { port, seen }
    }

    /// How many such requests came.
    pub(crate) fn count(&self, such: impl Fn(&Request) -> bool) -> usize {
        self.seen.lock().expect("lock").iter().filter(|request| such(request)).count()
    }
}

fn serve(
    client: TcpStream,
    upstream: u16,
    (plan, change): (&Plan, &Change),
    seen: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut client = client;
    let (mut head, mut length) = (String::new(), 0_usize);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        if line == "\r\n" {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().expect("a length"),
                "connection" => continue,
                _ => {}
            }
        }
        head += &line;
    }
    let mut words = head.splitn(3, ' ');
    let (method, target) =
        (words.next().expect("method").into(), words.next().expect("target").into());
    let rest = words.next().expect("version").to_owned();
    let mut request = {
        let mut seen = seen.lock().expect("lock");
        let request = Request { method, target, head: rest, number: seen.len() };
        seen.push(request.clone());
        request
    };
    let fate = plan(&mut request);
    if fate == Fate::Reset {
        let mut half = vec![0; length / 2];
        reader.read_exact(&mut half)?;
        // With nothing to linger for, closing resets.
        rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO))?;
        return Ok(());
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    if let Fate::Refused(status, code) = fate {
        let text = format!("<Error><Code>{code}</Code><Message>by the proxy</Message></Error>");
        let text = if request.method == "HEAD" { String::new() } else { text };
        let length = text.len();
        let head = format!(
            "HTTP/1.1 {status} No\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        );
        return client.write_all((head + &text).as_bytes());
    }
    if let Fate::Late(by) = fate {
        std::thread::sleep(by);
    }
    if fate == Fate::Flipped && !body.is_empty() {
        body[length / 3] ^= 1;
    }
    let mut server = TcpStream::connect(("127.0.0.1", upstream))?;
    let Request { method, target, head, .. } = &request;
    server.write_all(format!("{method} {target} {head}Connection: close\r\n\r\n").as_bytes())?;
    server.write_all(&body)?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    let mut answer = change(&request, answer);
    match fate {
        Fate::AnswerLost => Ok(()),
        Fate::AnswerCut => {
            let end = answer.windows(4).position(|four| four == b"\r\n\r\n").map_or(0, |at| at + 4);
            client.write_all(&answer[..end + (answer.len() - end) / 2])
        }
        Fate::Tagged => {
            let line = answer.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            answer.splice(line..line, *b"ETag: \"-\"\r\n");
            client.write_all(&answer)
        }
        _ => client.write_all(&answer),
    }
}
