//! The command line of hardmax.
fn main() -> hardmax::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let path = std::env::args().nth(1).unwrap_or_default();
    let resume = std::env::args().nth(2).is_some();
    let trainer = hardmax::train::trainer::Trainer::new(hardmax::train::config::TrainConfig::read(path.as_ref())?, resume)?;
    tracing::info!("{}", trainer.summary());
    trainer.run()?;
    Ok(())
}
