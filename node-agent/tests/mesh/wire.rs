//! A wire between agents that can be bad: connections go through it, those with chunks as it is told.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// What happens to chunks on their way to an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// They are taken, and nothing is ever answered.
    Silent,
    /// One byte a second.
    Trickling,
    /// The connection is closed after a megabyte.
    Closing,
}

pub(crate) struct Wire {
    listener: TcpListener,
    manner: Manner,
    /// Connections with chunks that came.
    came: Arc<AtomicUsize>,
}

impl Wire {
    pub(crate) fn new(manner: Manner) -> (Self, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let came = Arc::new(AtomicUsize::new(0));
        (Self { listener, manner, came: came.clone() }, came)
    }

    /// From here on it leads there; where it begins.
    pub(crate) fn lead_to(self, to: SocketAddr) -> SocketAddr {
        let at = self.listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in self.listener.incoming().map_while(Result::ok) {
                let (manner, came) = (self.manner, self.came.clone());
                thread::spawn(move || carry(stream, to, manner, &came));
            }
        });
        at
    }
}

fn carry(from: TcpStream, to: SocketAddr, manner: Manner, came: &AtomicUsize) {
    let mut first = [0; 2];
    while matches!(from.peek(&mut first), Ok(1)) {
        thread::sleep(Duration::from_millis(1));
    }
    let Ok(to) = TcpStream::connect(to) else { return };
    let back = (to.try_clone().unwrap(), from.try_clone().unwrap());
    let is_chunk = matches!(&first, b"PU" | b"GE");
    let manner = Some(manner).filter(|_| is_chunk);
    came.fetch_add(usize::from(is_chunk), Ordering::Relaxed);
    if manner == Some(Manner::Silent) {
        let _ = std::io::copy(&mut &from, &mut std::io::sink());
        return;
    }
    thread::spawn(move || pass(back.0, back.1, None));
    pass(from, to, manner);
}

fn pass(mut from: TcpStream, mut to: TcpStream, manner: Option<Manner>) {
    let mut buffer = vec![0; 64 << 10];
    let mut passed = 0;
    loop {
        let want = if manner == Some(Manner::Trickling) { 1 } else { buffer.len() };
        let Ok(n) = from.read(&mut buffer[..want]) else { break };
        let over = manner == Some(Manner::Closing) && passed > 1 << 20;
        if n == 0 || over || to.write_all(&buffer[..n]).is_err() {
            break;
        }
        passed += n;
        if manner == Some(Manner::Trickling) {
            thread::sleep(Duration::from_secs(1));
        }
    }
    for stream in [from, to] {
        let _ = stream.shutdown(Shutdown::Both); // The other direction may have done so.
    }
}
