package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/IBM/sarama"
)

var saramaCodecs = map[string]sarama.CompressionCodec{
	"none":   sarama.CompressionNone,
	"gzip":   sarama.CompressionGZIP,
	"snappy": sarama.CompressionSnappy,
	"lz4":    sarama.CompressionLZ4,
	"zstd":   sarama.CompressionZSTD,
}

func saramaConfig() *sarama.Config {
	config := sarama.NewConfig()
	config.Version = sarama.V3_6_0_0
	config.Producer.Return.Successes = true
	config.Producer.RequiredAcks = sarama.WaitForAll
	config.Producer.Idempotent = true
	config.Net.MaxOpenRequests = 1
	config.Consumer.Offsets.Initial = sarama.OffsetOldest
	config.Consumer.Offsets.AutoCommit.Enable = false
	return config
}

func saramaOn(brokers []string, topic string) error {
	admin, err := sarama.NewClusterAdmin(brokers, saramaConfig())
	if err != nil {
		return err
	}
	defer admin.Close()
	detail := sarama.TopicDetail{NumPartitions: 2, ReplicationFactor: 1}
	if err := admin.CreateTopic(topic, &detail, false); err != nil {
		return err
	}
	for turn := range 2 {
		for _, codec := range codecs {
			if err := saramaProduce(brokers, topic, turn, codec); err != nil {
				return err
			}
		}
		if err := saramaRead(brokers, topic, turn); err != nil {
			return err
		}
	}
	return saramaAdmin(admin, topic)
}

func saramaProduce(brokers []string, topic string, turn int, codec string) error {
	config := saramaConfig()
	config.Producer.Compression = saramaCodecs[codec]
	producer, err := sarama.NewSyncProducer(brokers, config)
	if err != nil {
		return err
	}
	var messages []*sarama.ProducerMessage
	for _, value := range values(turn, codec) {
		messages = append(messages, &sarama.ProducerMessage{
			Topic: topic,
			Key:   sarama.StringEncoder(value),
			Value: sarama.StringEncoder(value),
		})
	}
	return first(producer.SendMessages(messages), producer.Close())
}

// Reads until all have come.
type saramaReader struct {
	seen chan string
}

func (*saramaReader) Setup(sarama.ConsumerGroupSession) error { return nil }

func (*saramaReader) Cleanup(session sarama.ConsumerGroupSession) error {
	session.Commit()
	return nil
}

func (reader *saramaReader) ConsumeClaim(session sarama.ConsumerGroupSession, claim sarama.ConsumerGroupClaim) error {
	for {
		select {
		case message, open := <-claim.Messages():
			if !open {
				return nil
			}
			session.MarkMessage(message, "")
			reader.seen <- string(message.Value)
		case <-session.Context().Done():
			return nil
		}
	}
}

func saramaRead(brokers []string, topic string, turn int) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	group, err := sarama.NewConsumerGroup(brokers, topic, saramaConfig())
	if err != nil {
		return err
	}
	reader := &saramaReader{seen: make(chan string, len(all(turn)))}
	consumed := make(chan error, 1)
	go func() { consumed <- group.Consume(ctx, []string{topic}, reader) }()
	var seen []string
	for len(seen) < len(all(turn)) {
		select {
		case value := <-reader.seen:
			seen = append(seen, value)
		case err := <-consumed:
			return errors.Join(err, fmt.Errorf("only %d records came", len(seen)))
		}
	}
	cancel()
	return first(same(seen, all(turn)), <-consumed, group.Close())
}

func saramaAdmin(admin sarama.ClusterAdmin, topic string) error {
	value := "77777"
	change := map[string]sarama.IncrementalAlterConfigsEntry{
		"retention.ms": {Operation: sarama.IncrementalAlterConfigsOperationSet, Value: &value},
	}
	if err := admin.IncrementalAlterConfig(sarama.TopicResource, topic, change, false); err != nil {
		return err
	}
	resource := sarama.ConfigResource{Type: sarama.TopicResource, Name: topic, ConfigNames: []string{"retention.ms"}}
	err := until("the configuration is told", func() (bool, error) {
		entries, err := admin.DescribeConfig(resource)
		return len(entries) == 1 && entries[0].Value == value, err
	})
	if err != nil {
		return err
	}
	groups, err := admin.ListConsumerGroups()
	if err != nil {
		return err
	}
	if _, listed := groups[topic]; !listed {
		return fmt.Errorf("the group is not listed: %v", groups)
	}
	if _, err := admin.DescribeLogDirs([]int32{1}); err != nil {
		return err
	}
	return first(
		admin.DeleteConsumerGroupOffset(topic, topic, 0),
		admin.DeleteConsumerGroup(topic),
		admin.DeleteTopic(topic),
	)
}
