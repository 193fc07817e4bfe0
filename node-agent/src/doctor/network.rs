//! Whether agents could talk to each other from here: whether the port is free, and who answers at it.
//!
//! That packets of UDP arrive cannot be seen from one end: of the two protocols TCP is tried.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket},
    time::Duration,
};

use super::{Finding, Level};

const TOPIC: &str = "network";

/// An agent on the same network answers in less.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// So many of a large cluster say enough.
const TRIED_MAX: usize = 16;

/// Whether an agent could listen at `address`.
pub(super) fn port(address: SocketAddr) -> Finding {
    let tried = TcpListener::bind(address)
        .map_err(|e| ("tcp", e))
        .and_then(|_| UdpSocket::bind(address).map_err(|e| ("udp", e)));
    match tried {
        Ok(_) => Finding::new(Level::Ok, TOPIC, format!("{address} is free, for tcp and udp")),
        Err((what, e)) => {
            let text = format!("an agent cannot listen at {address}/{what}: {e}");
            let fix =
                "end what listens there, or give `gossip` another port, the same on all nodes";
            Finding::new(Level::Error, TOPIC, text).fix(fix)
        }
    }
}

/// Which of the agents that these names stand for answer.
pub(super) fn seeds(seeds: &[String]) -> Vec<Finding> {
    let mut all = Vec::new();
    let mut addresses: BTreeSet<SocketAddr> = BTreeSet::new();
    for seed in seeds {
        match seed.to_socket_addrs() {
            Ok(found) => addresses.extend(found),
            Err(e) => {
                let text = format!("{seed} is no address yet: {e}");
                let fix =
                    "nothing, where this is the first agent of its cluster; else look at the name";
                all.push(Finding::new(Level::Note, TOPIC, text).fix(fix));
            }
        }
    }
    if addresses.is_empty() {
        return all;
    }
    let tried: Vec<SocketAddr> = addresses.into_iter().take(TRIED_MAX).collect();
    let reach = |address: &SocketAddr| TcpStream::connect_timeout(address, ANSWER_WITHIN).err();
    let silent: Vec<(SocketAddr, String)> = std::thread::scope(|scope| {
        let asked: Vec<_> = tried.iter().map(|at| scope.spawn(move || (*at, reach(at)))).collect();
        let answers = asked.into_iter().filter_map(|one| one.join().ok());
        answers.filter_map(|(at, error)| Some((at, error?.to_string()))).collect()
    });
    let text = format!("agents that answer: {} of {}", tried.len() - silent.len(), tried.len());
    let Some((at, why)) = silent.first() else {
        all.push(Finding::new(Level::Ok, TOPIC, text));
        return all;
    };
    let (level, text) = match silent.len() < tried.len() {
        true => (Level::Note, format!("{text}: {at} does not ({why})")),
        false => (Level::Warning, format!("{text}: {at} does not ({why})")),
    };
    let fix = "let agents reach each other at that port, by TCP and by UDP (NetworkPolicy, firewall, \
               security group); one that is being started or is down does not answer either";
    all.push(Finding::new(level, TOPIC, text).fix(fix));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_is_taken_is_an_error_and_who_answers_is_counted() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = taken.local_addr().unwrap();
        let found = port(at);
        assert_eq!(found.level, Level::Error);
        assert!(found.found.contains("/tcp: "), "{found:?}");
        let [answers] = &seeds(&[at.to_string()])[..] else { panic!() };
        assert_eq!(
            (answers.level, answers.found.as_str()),
            (Level::Ok, "agents that answer: 1 of 1")
        );
        drop(taken);
        assert_eq!(port(at).level, Level::Ok);
        let [silent] = &seeds(&[at.to_string()])[..] else { panic!() };
        assert_eq!(silent.level, Level::Warning);
        assert!(silent.found.starts_with("agents that answer: 0 of 1: 127.0.0.1:"), "{silent:?}");
        let [nobody] = &seeds(&["no.such.name.invalid:9178".into()])[..] else { panic!() };
        assert_eq!(nobody.level, Level::Note);
    }
}
