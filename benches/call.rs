//! Round trips to an agent: `bench-call SOCKET DESTINATION COUNT` prints the microseconds of each
//! hundredth.

#![allow(clippy::disallowed_methods, clippy::print_stdout)] // It measures, and says so.

use std::{error::Error, path::Path, time::Instant};

use tierkeep::{begin::Begin, checkpointer::Checkpointer, config::Config};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, socket, destination, count] = &arguments[..] else {
        return Err("bench-call SOCKET DESTINATION COUNT".into());
    };
    let mut config = Config::new(Path::new(destination))?;
    config.agent = Some(socket.into());
    let ckpt = Checkpointer::open(config)?;
    ckpt.begin(&Begin::default())?;
    let call = || -> tierkeep::Result<f64> {
        let begun = Instant::now();
        ckpt.agree_on_init("nothing")?;
        Ok(begun.elapsed().as_secs_f64() * 1e6)
    };
    for _ in 0..1000 {
        call()?;
    }
    let mut took = (0..count.parse()?).map(|_| call()).collect::<tierkeep::Result<Vec<f64>>>()?;
    took.sort_by(f64::total_cmp);
    let at = |percent: usize| took[(took.len() * percent / 100).min(took.len() - 1)];
    let all: Vec<f64> = (0..=100).map(at).collect();
    println!("{}", serde_json::json!(all));
    Ok(())
}
